"""Layer norm, alone and behind a residual add: launchers of csrc/cpu/layer_norm.inl and their PyTorch ops."""
import torch

from fastgpt.extension import _C
from fastgpt.cpu.launch import DTYPES, dense, pointer, rows_of
from fastgpt.torch_op import define


def _statistics(x):
    """Room for each row's mean and reciprocal standard deviation: (2, rows), float32."""
    return torch.empty((2, rows_of(x)[0]), dtype=torch.float32, device=x.device)


def _normalise(x, residual, weight, bias, eps):
    """-> y, x + residual (None without a residual), statistics."""
    x, residual, weight, bias = dense(x, residual, weight, bias)
    y, statistics = torch.empty_like(x), _statistics(x)
    total = None if residual is None else torch.empty_like(x)
    rows, C = rows_of(x)
    mean = pointer(statistics)
    _C.layer_norm_forward(DTYPES[x.dtype], DTYPES[weight.dtype], pointer(x), pointer(residual), pointer(weight),
                          pointer(bias), pointer(y), pointer(total), mean, mean + 4 * rows, rows, C, eps)
    return y, total, statistics


def _forward(x, weight, bias, eps):
    y, _, statistics = _normalise(x, None, weight, bias, eps)
    return y, statistics


def _backward(dy, dtotal, x, weight, statistics):
    """dtotal: what else flows into x (the residual stream's gradient), or None -> dx, gradients (2, C) of weight, bias."""
    dy, dtotal, weight = dense(dy, dtotal, weight)
    dx, gradients = torch.empty_like(x), torch.empty((2, weight.shape[0]), dtype=torch.float32, device=x.device)
    rows, C = rows_of(x)
    mean, dweight = pointer(statistics), pointer(gradients)
    _C.layer_norm_backward(DTYPES[x.dtype], DTYPES[weight.dtype], pointer(dy), pointer(dtotal), pointer(x),
                           pointer(weight), mean, mean + 4 * rows, pointer(dx), dweight, dweight + 4 * C, rows, C)
    return dx, gradients.to(weight.dtype)


def _fake_forward(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _statistics(x)


def _fake_add_forward(x, residual, weight, bias, eps):
    y, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return y, total, _statistics(x)


def _fake_backward(dy, dtotal, x, weight, statistics):
    return torch.empty_like(x), weight.new_empty((2, weight.shape[0]))


def _setup(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, statistics = output
    _save(ctx, x.contiguous(), weight, bias, statistics)


def _add_setup(ctx, inputs, output):
    _, _, weight, bias, _ = inputs
    _, total, statistics = output
    _save(ctx, total, weight, bias, statistics)


def _save(ctx, normalised, weight, bias, statistics):
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(normalised, weight, statistics)
    ctx.has_bias = bias is not None


def _grad(ctx, dy, _):
    if dy is None:
        return None, None, None, None
    dx, gradients = _layer_norm_backward(dy, None, *ctx.saved_tensors)
    return dx, gradients[0], gradients[1] if ctx.has_bias else None, None


def _add_grad(ctx, dy, dtotal, _):
    if dy is None:
        return dtotal, dtotal, None, None, None
    dx, gradients = _layer_norm_backward(dy, dtotal, *ctx.saved_tensors)
    return dx, dx, gradients[0], gradients[1] if ctx.has_bias else None, None


_layer_norm_backward = define(
    "layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor statistics) -> (Tensor, Tensor)",
    _backward, _fake_backward)
_layer_norm = define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
                     _forward, _fake_forward, setup_context=_setup, backward=_grad)
_add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _normalise, _fake_add_forward, setup_context=_add_setup, backward=_add_grad)


def _of_one_dtype(x, weight, bias):
    """Weight and bias as the kernels take them: both in x's dtype, or both in float32."""
    if weight.dtype in (x.dtype, torch.float32) and (bias is None or bias.dtype == weight.dtype):
        return weight, bias
    return weight.float(), None if bias is None else bias.float()


def layer_norm(x, weight, bias=None, eps=1e-5):
    return _layer_norm(x, *_of_one_dtype(x, weight, bias), eps)[0]


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5):
    return _add_layer_norm(x, residual, *_of_one_dtype(x, weight, bias), eps)[:2]
