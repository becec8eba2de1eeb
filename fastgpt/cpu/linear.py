"""The linear layer: product, bias, activation and residual in one pass; its gradients are two more products.

The activation's result is not kept by the layer behind, whose weight's gradient alone wants it: backward makes it again.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from fastgpt.autograd.tensors import dense, give_recipe, recipe_of
from fastgpt.cpu.gelu import gelu
from fastgpt.cpu.gemm import matmul
from fastgpt.cpu.launch import DTYPES, pointer
from fastgpt.extension import _C, ACTIVATIONS, HAS_BF16
from fastgpt.memory import empty, empty_like
from fastgpt.reference import GELU_APPROXIMATION
from fastgpt.torch_op import define, is_traced, needs_gradient


def bfloat16_product():
    """Who multiplies bfloat16 matrices on this processor: ("torch" or "cpp", reason)."""
    if HAS_BF16:
        return "torch", "the processor has avx512_bf16, which oneDNN drives at 95 % of its peak"
    return "cpp", "without avx512_bf16 the products run in float32 arithmetic, where ours is faster"


def _rows(x):
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _forward(x, weight, bias, residual, activation, keep_pre):
    """-> y (..., N), and the activation's input, if it is to be kept for backward (else no elements)."""
    bias, residual = dense(bias, residual)
    shape = (*x.shape[:-1], weight.shape[0])
    y, pre = empty(shape, x.dtype), empty(shape if keep_pre else (0,), x.dtype)
    matmul(_rows(x), weight.t(), out=_rows(y), bias=bias, activation=activation or None,
           pre=pre if keep_pre else None, residual=residual)
    return y, pre


def _backward(dy, x, weight, pre, activation, wanted):
    """wanted: which of dx, dweight and dbias; one that is not has no elements."""
    dz, dbias = _activation_backward(_rows(dy), pre, activation, wanted[2])
    dx = matmul(dz, weight).view(x.shape) if wanted[0] else dy.new_empty(0)
    dweight = matmul(dz.t(), _rows(x)) if wanted[1] else dy.new_empty(0)
    return dx, dweight, dbias


def _activation_backward(dy, pre, activation, wants_dbias):
    """The gradient at the activation's input (rows, N), and its sum over the rows."""
    if activation or wants_dbias:
        dy = dy.contiguous()
    dz = empty_like(dy) if activation else dy
    dbias = torch.empty(dy.shape[1] if wants_dbias else 0, dtype=torch.float32, device=dy.device)
    _C.activation_backward(DTYPES[dy.dtype], ACTIVATIONS[activation or None], pointer(dy), pointer(pre), pointer(dz),
                           pointer(dbias) if wants_dbias else 0, *dy.shape)
    return dz, dbias.to(dy.dtype)


def _fake_forward(x, weight, bias, residual, activation, keep_pre):
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep_pre else 0)


def _fake_backward(dy, x, weight, pre, activation, wanted):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(dy.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted))


def _setup(ctx, inputs, output):
    x, weight, _, residual, ctx.activation, _ = inputs
    y, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)  # of `pre`, zeros of its size
    ctx.make, ingredients = recipe_of(x)
    ctx.save_for_backward(weight, pre, *ingredients)
    if ctx.activation and residual is None and not is_traced(y):
        give_recipe(y, partial(_activate, activation=ctx.activation), pre)


def _grad(ctx, dy, _):
    if dy is None:
        return (None,) * 6
    wanted, gradients = list(ctx.needs_input_grad[:3]), (None,) * 3
    if any(wanted):
        weight, pre, *ingredients = ctx.saved_tensors
        x = ctx.make(*ingredients) if wanted[1] else ingredients[0]  # of which the shape is wanted, which is the same
        gradients = _linear_backward(dy, x, weight, pre, ctx.activation, wanted)
    dresidual = dy if ctx.needs_input_grad[3] else None
    return *(g if want else None for g, want in zip(gradients, wanted)), dresidual, None, None


_linear_backward = define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor pre, str activation, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)", _backward, _fake_backward)
_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool keep_pre)"
    " -> (Tensor, Tensor)", _forward, _fake_forward, setup_context=_setup, backward=_grad)


def linear(x, weight, bias=None, *, activation=None, residual=None):
    if x.dtype == torch.bfloat16 and bfloat16_product()[0] == "torch":
        return _with_torch_product(x, weight, bias, activation, residual)
    keep_pre = activation is not None and needs_gradient(x, weight, bias)
    return _linear(x, weight, bias, residual, activation or "", keep_pre)[0]


def _with_torch_product(x, weight, bias, activation, residual):
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = _activate(y, activation)
    return y if residual is None else y + residual


def _activate(x, activation):
    return F.relu(x) if activation == "relu" else gelu(x, GELU_APPROXIMATION[activation])
