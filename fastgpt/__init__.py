"""fastgpt: a GPT engine with kernels of its own."""
