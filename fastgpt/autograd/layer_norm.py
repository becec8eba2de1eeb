"""Layer norm, alone and behind dropout and a residual add."""
from functools import partial

import torch

from fastgpt.autograd.tensors import give_recipe
from fastgpt.torch_op import define, is_traced, seed_tensor


def define_layer_norm(prefix, launch, launch_backward, remade=False):
    """-> (layer_norm, add_layer_norm), with ops of torch.library named after `prefix`.

    launch(x, residual, weight, bias, seed, eps, dropout_p) -> y, total (None without a residual), statistics.
    launch_backward(dy, dtotal, total, weight, statistics, seed, dropout_p) -> dresidual, dx (no elements without
    dropout, where it is dresidual), gradients (2, C) of weight and bias.
    remade: the product behind, which wants y for its weight's gradient alone, may make it again from what is kept here.
    """
    again = partial(_norm_again, launch) if remade else None
    backward = define(
        f"{prefix}layer_norm_backward(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor statistics,"
        " Tensor? seed, float dropout_p) -> (Tensor, Tensor, Tensor)", launch_backward, _fake_backward)

    def forward(x, weight, bias, eps):
        y, _, statistics = launch(x, None, weight, bias, None, eps, 0.0)
        return y, statistics

    def grad(ctx, dy, _):
        if dy is None:
            return None, None, None, None
        total, weight, statistics, seed = ctx.saved_tensors
        dx, _, gradients = backward(dy, None, total, weight, statistics, seed, 0.0)
        return dx, gradients[0], gradients[1] if ctx.has_bias else None, None

    def add_grad(ctx, dy, dtotal, _):
        if dy is None:
            # The norm took no part; the sum alone did. With dropout a zero gradient of the norm does as well.
            if dtotal is None or not ctx.dropout_p:
                return dtotal, dtotal, None, None, None, None, None
            dy = torch.zeros_like(dtotal)
        dresidual, dx, gradients = backward(dy, dtotal, *ctx.saved_tensors, ctx.dropout_p)
        dbias = gradients[1] if ctx.has_bias else None
        return dx if ctx.dropout_p else dresidual, dresidual, gradients[0], dbias, None, None, None

    norm = define(f"{prefix}layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
                  forward, _fake_forward, setup_context=partial(_setup, again), backward=grad)
    add_norm = define(
        f"{prefix}add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? seed, float eps,"
        " float dropout_p) -> (Tensor, Tensor, Tensor)", launch, _fake_add_forward, setup_context=partial(_add_setup, again),
        backward=add_grad)

    def layer_norm(x, weight, bias=None, eps=1e-5):
        return norm(x, *_of_one_dtype(x, weight, bias), eps)[0]

    def add_layer_norm(x, residual, weight, bias=None, eps=1e-5, *, dropout_p=0.0, seed=0):
        weight, bias = _of_one_dtype(x, weight, bias)
        return add_norm(x, residual, weight, bias, seed_tensor(dropout_p, seed), eps, dropout_p)[:2]

    return layer_norm, add_layer_norm


def _norm_again(launch, eps, total, weight, bias):
    return launch(total, None, weight, bias, None, eps, 0.0)[0]


def _setup(again, ctx, inputs, output):
    x, weight, bias, eps = inputs
    y, statistics = output
    total = x.contiguous()
    _save(ctx, total, weight, bias, statistics, None)
    _give_recipe(again, eps, y, (total, weight, bias))


def _add_setup(again, ctx, inputs, output):
    _, _, weight, bias, seed, eps, ctx.dropout_p = inputs
    y, total, statistics = output
    _save(ctx, total, weight, bias, statistics, seed)
    _give_recipe(again, eps, y, (total, weight, bias))


def _save(ctx, total, weight, bias, statistics, seed):
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, statistics, seed)
    ctx.has_bias = bias is not None


def _give_recipe(again, eps, y, ingredients):
    if again is not None and not is_traced(y):
        give_recipe(y, partial(again, eps), *ingredients)


def _statistics(x):
    """Each row's mean and reciprocal standard deviation: (2, rows), float32."""
    C = x.shape[-1]
    return x.new_empty((2, x.numel() // C), dtype=torch.float32)


def _dense_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_forward(x, weight, bias, eps):
    return _dense_like(x), _statistics(x)


def _fake_add_forward(x, residual, weight, bias, seed, eps, dropout_p):
    return _dense_like(x), _dense_like(x), _statistics(x)


def _fake_backward(dy, dtotal, total, weight, statistics, seed, dropout_p):
    dx = torch.empty_like(total) if dropout_p else total.new_empty(0)
    return torch.empty_like(total), dx, weight.new_empty((2, weight.shape[0]))


def _of_one_dtype(x, weight, bias):
    """Weight and bias as the kernels take them: both in x's dtype, or both in float32."""
    if weight.dtype in (x.dtype, torch.float32) and (bias is None or bias.dtype == weight.dtype):
        return weight, bias
    return weight.float(), None if bias is None else bias.float()
