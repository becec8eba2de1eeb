"""GELU, alone and behind a bias."""
import torch

from fastgpt.torch_op import define


def define_gelu(prefix, launch, launch_backward):
    """-> (gelu, bias_gelu), with ops of torch.library named after `prefix`.

    launch(x, bias, tanh) -> y. launch_backward(dy, x, bias, tanh, wants_dbias) -> dx, dbias; a dbias that is not wanted
    has no elements. bias may be None.
    """
    backward = define(
        f"{prefix}gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool wants_dbias) -> (Tensor, Tensor)",
        launch_backward, _fake_backward)

    def grad(ctx, dy):
        wants_dbias = ctx.needs_input_grad[1]
        dx, dbias = backward(dy, *ctx.saved_tensors, ctx.tanh, wants_dbias)
        return dx, dbias if wants_dbias else None, None

    op = define(f"{prefix}gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor", launch, _fake_forward, setup_context=_setup,
                backward=grad)

    def gelu(x, approximate="none"):
        return op(x, None, approximate == "tanh")

    def bias_gelu(x, bias, approximate="none"):
        if x.dtype != bias.dtype:  # the sum's dtype is the wider one
            dtype = torch.promote_types(x.dtype, bias.dtype)
            x, bias = x.to(dtype), bias.to(dtype)
        return op(x, bias, approximate == "tanh")

    return gelu, bias_gelu


def _fake_forward(x, bias, tanh):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(dy, x, bias, tanh, wants_dbias):
    return _fake_forward(x, bias, tanh), x.new_empty(x.shape[-1] if wants_dbias else 0)


def _setup(ctx, inputs, output):
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)
