"""A language model's head and its loss in one op, for a chunk of rows at a time.

The chunk's logits become their own gradient in place and go at once into the products for dx and dweight, so that
backward has nothing left to do but multiply by the gradient that comes in. Only where each row has a gradient of its
own (reduction="none") does backward compute the chunks again.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastgpt.memory import empty
from fastgpt.torch_op import define

MIN_ROWS = 64
NOTHING = [False, False, False]


@dataclass(frozen=True)
class Products:
    """How a device multiplies the matrices of a dtype.

    multiply(a, b, out, accumulate=False, bias=None): out = a @ b + bias, or added to a float32 `out`.
    """
    logits_dtype: torch.dtype
    chunk_bytes: float  # of logits
    multiply: Callable


@dataclass(frozen=True)
class Launchers:
    """What a device does with logits.

    products(dtype) -> Products. row_stride(V): the distance of two rows of logits.
    count(targets, V, ignore_index) -> how many targets are not ignored: an int or a tensor () of the device.
    losses(logits, V, targets, scale, out, loss_options): logits (rows, row stride), of which V columns count; out (rows,)
    float32 receives the losses; with a scale, float32 (1,) for all rows or (rows,), the logits become scale * gradient.
    add_rows(x, sums): sums (N,) float32 += the sum of x (rows, N) over its rows.
    multiply_gradient(gradient, dloss) -> their product.
    """
    products: Callable
    row_stride: Callable
    count: Callable
    losses: Callable
    add_rows: Callable
    multiply_gradient: Callable


class _Gradients:
    """Room for what is wanted of dx (N, K), dweight (V, K) and dbias (V,); the rest has no elements."""

    def __init__(self, x, weight, wanted, chunks, products, add_rows):
        self.wanted, self.multiply, self.add_rows = wanted, products.multiply, add_rows
        self.dx = empty(x.shape if wanted[0] else (0,), x.dtype, x.device)
        self.dweight = empty(weight.shape if wanted[1] else (0,), x.dtype if chunks == 1 else torch.float32, x.device)
        self.dbias = torch.zeros(len(weight) if wanted[2] else 0, dtype=torch.float32, device=x.device)
        if chunks == 0:
            self.dweight.zero_()

    def add(self, dlogits, x, weight, begin):
        """Of a chunk: x holds its rows, from row `begin` on."""
        if self.wanted[0]:
            self.multiply(dlogits, weight, out=self.dx[begin:begin + len(x)])
        if self.wanted[1]:
            self.multiply(dlogits.t(), x, out=self.dweight, accumulate=begin > 0)
        if self.wanted[2]:
            self.add_rows(dlogits, self.dbias)

    def of_dtype(self, dtype):
        return self.dx, self.dweight.to(dtype), self.dbias.to(dtype)


def _in_chunks(launchers, x, weight, bias, targets, options, scale, wanted):
    """scale: as `Launchers.losses` has it, or None -> losses (N,), gradients."""
    N, V = len(x), len(weight)
    targets = targets.flatten()
    products, stride = launchers.products(x.dtype), launchers.row_stride(V)
    chunks, rows = _split(N, int(products.chunk_bytes / (max(stride, 1) * products.logits_dtype.itemsize)))
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    gradients = _Gradients(x, weight, wanted, chunks, products, launchers.add_rows)
    buffer = empty((rows, stride), products.logits_dtype, x.device)
    for begin in range(0, N, rows or 1):
        chunk, these = x[begin:begin + rows], slice(begin, begin + rows)
        logits = products.multiply(chunk, weight.t(), out=buffer[:len(chunk), :V], bias=bias)
        own = scale if scale is None or len(scale) == 1 else scale[these]
        launchers.losses(buffer[:len(chunk)], V, targets[these], own, losses[these], options)
        if scale is not None:
            gradients.add(logits, chunk, weight, begin)
    return losses, gradients.of_dtype(x.dtype)


def _split(N, most):
    """N rows in chunks of nearly one size, of at most `most` rows: (chunks, rows in each but the last)."""
    chunks = -(-N // max(MIN_ROWS, most))
    return chunks, -(-N // chunks) if chunks else 0


def define_cross_entropy(prefix, launchers):
    """-> cross_entropy(x, weight, targets, ...), with ops of torch.library named after `prefix`.

    Among the ops' arguments `ignore_index, smoothing, z_loss` are the options of a row's loss, `wanted` says which of
    the gradients of x, weight and bias to compute; one that is not has no elements.
    """
    def forward(x, weight, bias, targets, ignore_index, smoothing, z_loss, mean, wanted):
        count = launchers.count(targets, len(weight), ignore_index)
        scale = None
        if any(wanted):
            scale = torch.ones(1, dtype=torch.float32, device=x.device)
            if mean and not _divides_later(x.dtype):
                scale = scale / _at_least_one(count)
        losses, gradients = _in_chunks(launchers, x, weight, bias, targets, (ignore_index, smoothing, z_loss), scale,
                                       wanted)
        total = losses.sum(dtype=torch.float64)
        return (total / count if mean else total).float(), *gradients

    def rows_forward(x, weight, bias, targets, ignore_index, smoothing, z_loss):
        launchers.count(targets, len(weight), ignore_index)
        options = ignore_index, smoothing, z_loss
        return _in_chunks(launchers, x, weight, bias, targets, options, None, NOTHING)[0].view(targets.shape)

    def rows_backward(dlosses, x, weight, bias, targets, ignore_index, smoothing, z_loss, wanted):
        scale = dlosses.float().flatten().contiguous()  # the gradient of a sum has stride 0
        return _in_chunks(launchers, x, weight, bias, targets, (ignore_index, smoothing, z_loss), scale, wanted)[1]

    def grad(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 9
        *gradients, targets = ctx.saved_tensors
        if ctx.mean and _divides_later(gradients[0].dtype):
            dloss = dloss / _at_least_one(launchers.count(targets, ctx.V, ctx.ignore_index))
        gradients = (launchers.multiply_gradient(g, dloss) for g in gradients)
        wanted = (g if want else None for g, want in zip(gradients, ctx.needs_input_grad))
        return *wanted, None, None, None, None, None, None

    def rows_grad(ctx, dlosses):
        wanted = list(ctx.needs_input_grad[:3])
        gradients = backward_of_rows(dlosses, *ctx.saved_tensors, *ctx.options, wanted)
        return *(g if want else None for g, want in zip(gradients, wanted)), None, None, None, None

    inputs = "Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, float smoothing, float z_loss"
    backward_of_rows = define(
        f"{prefix}cross_entropy_rows_backward(Tensor dlosses, {inputs}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
        rows_backward, _fake_rows_backward)
    of_rows = define(f"{prefix}cross_entropy_rows({inputs}) -> Tensor", rows_forward, _fake_rows_forward,
                     setup_context=_rows_setup, backward=rows_grad)
    of_all = define(f"{prefix}cross_entropy({inputs}, bool mean, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
                    forward, _fake_forward, setup_context=_setup, backward=grad)

    def cross_entropy(x, weight, targets, *, bias=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
                      z_loss=0.0):
        x = x.reshape(targets.numel(), x.shape[-1])
        if bias is not None:
            bias = bias.to(x.dtype)
        options = ignore_index, float(label_smoothing), float(z_loss)
        if reduction == "none":
            return of_rows(x, weight, bias, targets, *options)
        wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
        return of_all(x, weight, bias, targets, *options, reduction == "mean", wanted)[0]

    return cross_entropy


def _fake_gradients(x, weight, wanted):
    return tuple(x.new_empty(shape if want else 0)
                 for shape, want in zip((x.shape, weight.shape, weight.shape[:1]), wanted))


def _fake_forward(x, weight, bias, targets, ignore_index, smoothing, z_loss, mean, wanted):
    return x.new_empty((), dtype=torch.float32), *_fake_gradients(x, weight, wanted)


def _fake_rows_forward(x, weight, bias, targets, ignore_index, smoothing, z_loss):
    return x.new_empty(targets.shape, dtype=torch.float32)


def _fake_rows_backward(dlosses, x, weight, bias, targets, ignore_index, smoothing, z_loss, wanted):
    return _fake_gradients(x, weight, wanted)


def _at_least_one(count):
    """What a mean's gradients are divided by: with every target ignored they are 0, not 0 / 0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def _divides_later(dtype):
    """Whether the mean's division waits for backward: in float16 a share of 1 / rows would vanish before a gradient scaler's
    factor comes, which keeps it from that."""
    return dtype == torch.float16


def _setup(ctx, inputs, output):
    _, weight, _, targets, ctx.ignore_index, _, _, ctx.mean, _ = inputs
    _, *gradients = output
    ctx.V = len(weight)
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, targets)


def _rows_setup(ctx, inputs, output):
    x, weight, bias, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias, targets)
