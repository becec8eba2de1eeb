"""Layer norm, alone and behind dropout and a residual add: launchers of csrc/cpu/layer_norm.inl and dropout.inl."""
import torch

from fastgpt.autograd.layer_norm import define_layer_norm
from fastgpt.autograd.tensors import dense, rows_of
from fastgpt.cpu.launch import DTYPES, pointer
from fastgpt.extension import _C
from fastgpt.memory import empty_like


def _dropout(x, seed, dropout_p):
    """x with each element dropped or multiplied by 1 / (1 - dropout_p); its own backward."""
    x, = dense(x)
    out = empty_like(x)
    _C.dropout(DTYPES[x.dtype], pointer(x), pointer(out), *rows_of(x), int(seed), dropout_p)
    return out


def _normalise(x, residual, weight, bias, seed, eps, dropout_p):
    """-> y, dropout(x) + residual (None without a residual), statistics (2, rows): means, reciprocal deviations."""
    if dropout_p:
        x = _dropout(x, seed, dropout_p)
    x, residual, weight, bias = dense(x, residual, weight, bias)
    rows, C = rows_of(x)
    y, total = empty_like(x), None if residual is None else empty_like(x)
    statistics = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    mean = pointer(statistics)
    _C.layer_norm_forward(DTYPES[x.dtype], DTYPES[weight.dtype], pointer(x), pointer(residual), pointer(weight),
                          pointer(bias), pointer(y), pointer(total), mean, mean + 4 * rows, rows, C, eps)
    return y, total, statistics


def _backward(dy, dtotal, total, weight, statistics, seed, dropout_p):
    """dtotal: what else flows into the sum (the residual stream's gradient), or None."""
    dy, dtotal, weight = dense(dy, dtotal, weight)
    rows, C = rows_of(total)
    dresidual = empty_like(total)
    gradients = torch.empty((2, C), dtype=torch.float32, device=total.device)
    mean, dweight = pointer(statistics), pointer(gradients)
    _C.layer_norm_backward(DTYPES[total.dtype], DTYPES[weight.dtype], pointer(dy), pointer(dtotal), pointer(total),
                           pointer(weight), mean, mean + 4 * rows, pointer(dresidual), dweight, dweight + 4 * C, rows, C)
    dx = _dropout(dresidual, seed, dropout_p) if dropout_p else total.new_empty(0)
    return dresidual, dx, gradients.to(weight.dtype)


layer_norm, add_layer_norm = define_layer_norm("", _normalise, _backward, remade=True)
