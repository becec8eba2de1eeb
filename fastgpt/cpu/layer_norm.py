"""Layer norm, alone and behind a residual add: launchers of csrc/cpu/layer_norm.inl and their PyTorch ops."""
import torch

from fastgpt.cpu.extension import _C
from fastgpt.cpu.launch import DTYPES, dense, pointer, rows_of
from fastgpt.torch_op import define


def _statistics(x):
    """Uninitialised mean and reciprocal standard deviation of each row."""
    return (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))


def _forward(x, weight, bias, eps):
    x, weight, bias = dense(x, weight, bias)
    y = torch.empty_like(x)
    mean, rstd = _statistics(x)
    _C.layer_norm_forward(DTYPES[x.dtype], DTYPES[weight.dtype], pointer(x), 0, pointer(weight), pointer(bias),
                          pointer(y), 0, pointer(mean), pointer(rstd), *rows_of(x), eps)
    return y, mean, rstd


def _add_forward(x, residual, weight, bias, eps):
    x, residual, weight, bias = dense(x, residual, weight, bias)
    y, total = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = _statistics(x)
    _C.layer_norm_forward(DTYPES[x.dtype], DTYPES[weight.dtype], pointer(x), pointer(residual), pointer(weight),
                          pointer(bias), pointer(y), pointer(total), pointer(mean), pointer(rstd), *rows_of(x), eps)
    return y, total, mean, rstd


def _backward(dy, dtotal, x, weight, mean, rstd):
    """dtotal: what else flows into x (the residual stream's gradient), or None -> dx, dweight, dbias."""
    dy, dtotal, weight = dense(dy, dtotal, weight)
    dx = torch.empty_like(x)
    dweight, dbias = torch.empty_like(weight, dtype=torch.float32), torch.empty_like(weight, dtype=torch.float32)
    _C.layer_norm_backward(DTYPES[x.dtype], DTYPES[weight.dtype], pointer(dy), pointer(dtotal), pointer(x),
                           pointer(weight), pointer(mean), pointer(rstd), pointer(dx), pointer(dweight),
                           pointer(dbias), *rows_of(x))
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _fake_forward(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), *_statistics(x)


def _fake_add_forward(x, residual, weight, bias, eps):
    y, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return y, total, *_statistics(x)


def _fake_backward(dy, dtotal, x, weight, mean, rstd):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x.contiguous(), weight, mean, rstd)
    ctx.has_bias = bias is not None


def _grad(ctx, dy, *_):
    if dy is None:
        return None, None, None, None
    dx, dweight, dbias = _layer_norm_backward(dy, None, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None


def _add_setup(ctx, inputs, output):
    _, _, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.has_bias = bias is not None


def _add_grad(ctx, dy, dtotal, *_):
    if dy is None:
        return dtotal, dtotal, None, None, None
    dx, dweight, dbias = _layer_norm_backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, dweight, dbias if ctx.has_bias else None, None


_layer_norm_backward = define(
    "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)", _backward, _fake_backward)
_layer_norm = define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
                     _forward, _fake_forward, setup_context=_setup, backward=_grad)
_add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)", _add_forward, _fake_add_forward, setup_context=_add_setup,
    backward=_add_grad)


def layer_norm(x, weight, bias=None, eps=1e-5):
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5):
    return _add_layer_norm(x, residual, weight, bias, eps)[:2]
