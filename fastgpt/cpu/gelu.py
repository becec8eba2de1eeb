"""GELU, alone and behind a bias: launchers of csrc/cpu/gelu.inl and their PyTorch ops."""
import torch

from fastgpt.extension import _C
from fastgpt.cpu.launch import DTYPES, dense, pointer, rows_of
from fastgpt.torch_op import define


def _shape(x, by_column):
    """(rows, columns) as the kernels see x: one row when nothing gives the columns a meaning."""
    return rows_of(x) if by_column else (1, x.numel())


def _forward(x, bias, tanh):
    x, bias = dense(x, bias)
    y = torch.empty_like(x)
    _C.gelu_forward(DTYPES[x.dtype], tanh, pointer(x), pointer(bias), pointer(y), *_shape(x, bias is not None))
    return y


def _backward(dy, x, bias, tanh, wants_dbias):
    """-> dx, dbias; a dbias that is not wanted has no elements."""
    dy, x, bias = dense(dy, x, bias)
    dx, dbias = torch.empty_like(x), _bias_gradient(x, wants_dbias)
    _C.gelu_backward(DTYPES[x.dtype], tanh, pointer(dy), pointer(x), pointer(bias), pointer(dx),
                     pointer(dbias) if wants_dbias else 0, *_shape(x, bias is not None or wants_dbias))
    return dx, dbias.to(x.dtype)


def _bias_gradient(x, wanted):
    return torch.empty(x.shape[-1] if wanted else 0, dtype=torch.float32, device=x.device)


def _fake_forward(x, bias, tanh):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(dy, x, bias, tanh, wants_dbias):
    return _fake_forward(x, bias, tanh), _bias_gradient(x, wants_dbias).to(x.dtype)


def _setup(ctx, inputs, output):
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _grad(ctx, dy):
    wants_dbias = ctx.needs_input_grad[1]
    dx, dbias = _gelu_backward(dy, *ctx.saved_tensors, ctx.tanh, wants_dbias)
    return dx, dbias if wants_dbias else None, None


_gelu_backward = define(
    "gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool wants_dbias) -> (Tensor, Tensor)", _backward,
    _fake_backward)
_gelu = define("gelu(Tensor x, Tensor? bias, bool tanh) -> Tensor", _forward, _fake_forward, setup_context=_setup,
               backward=_grad)


def gelu(x, approximate="none"):
    return _gelu(x, None, approximate == "tanh")


def bias_gelu(x, bias, approximate="none"):
    if x.dtype != bias.dtype:  # the sum's dtype is the wider one
        dtype = torch.promote_types(x.dtype, bias.dtype)
        x, bias = x.to(dtype), bias.to(dtype)
    return _gelu(x, bias, approximate == "tanh")
