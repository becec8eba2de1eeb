"""What the ops of every device share: their PyTorch op, fake outputs and gradients, made around a device's launchers."""
