"""The linear layer on a GPU: PyTorch's product, which cuBLAS makes near its peak, with what comes behind it fused."""
import torch.nn.functional as F

from fastgpt.kernels.gelu import bias_gelu, gelu


def linear(x, weight, bias=None, *, activation=None, residual=None):
    """With a GELU the bias goes into its kernel: the sum before it is neither written nor read once more."""
    if activation in ("gelu", "gelu_tanh"):
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        y = F.linear(x, weight)
        y = gelu(y, approximate) if bias is None else bias_gelu(y, bias, approximate)
    else:
        y = F.linear(x, weight, bias)
        y = F.relu(y) if activation == "relu" else y
    return y if residual is None else y + residual
