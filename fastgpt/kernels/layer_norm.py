"""Layer norm, alone or behind dropout and a residual add, for NVIDIA GPUs (Ba et al. 2016, arXiv:1607.06450).

A row is read once, stays in registers, and gets its mean and then its variance from there, and a correction of the mean:
exact for rows whose mean is large. A row of up to 1024 columns belongs to one warp, so its sums need no shared memory and no barrier.
Backward keeps a fixed number of programs, each walking over its share of the rows with the sums of dweight and dbias in
registers: the partial sums that go through memory do not grow with the rows, and one order of addition is kept.
"""
from functools import partial

import torch
import triton
import triton.language as tl

from fastgpt.autograd.layer_norm import define_layer_norm
from fastgpt.autograd.tensors import dense, rows_of
from fastgpt.kernels.dropout import dropout_arguments, keep_mask, row_keys
from fastgpt.kernels.launch import launch, processors
from fastgpt.kernels.reduce import sum_rows
from fastgpt.kernels.spec import Spec
from fastgpt.kernels.tuning import norm_backward_config, norm_forward_config


@triton.jit
def _keep(seed_low, seed_high, rows, columns, threshold):
    """The keep-mask of a (rows, columns) matrix: batch and head of the hash are 0."""
    zero = tl.zeros([1], tl.int32)
    return keep_mask(row_keys(seed_low, seed_high, zero, zero, rows)[:, None], columns[None, :], threshold)


@triton.jit(do_not_specialize=["N", "seed_low", "seed_high", "threshold"])
def layer_norm_forward_kernel(X, RESIDUAL, WEIGHT, BIAS, Y, TOTAL, STATISTICS, N, eps, seed_low, seed_high, threshold,
                              keep_scale, C: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr,
                              DROPOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Y = norm(total) * WEIGHT + BIAS, total = dropout(X) + RESIDUAL, rounded to TOTAL's dtype before it is normed.

    All matrices (N, C) contiguous. STATISTICS (2, N): means, then reciprocal standard deviations.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    exists = (rows < N)[:, None] & inside[None, :]
    at = rows[:, None].to(tl.int64) * C + columns[None, :]
    x = tl.load(X + at, mask=exists, other=0.0).to(tl.float32)
    if DROPOUT:
        x = tl.where(_keep(seed_low, seed_high, rows, columns, threshold), x * keep_scale, 0.0)
    if ADD:
        x += tl.load(RESIDUAL + at, mask=exists, other=0.0).to(tl.float32)
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, total, mask=exists)
        x = total.to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rest = tl.sum(centred, axis=1) / C  # what rounding left in the mean
    rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / C - rest * rest + eps)
    mean += rest
    y = (centred - rest[:, None]) * rstd[:, None] * tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=exists)
    tl.store(STATISTICS + rows, mean, mask=rows < N)
    tl.store(STATISTICS + N + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N", "seed_low", "seed_high", "threshold"])
def layer_norm_backward_kernel(DY, DTOTAL, TOTAL, WEIGHT, STATISTICS, DRESIDUAL, DX, PARTIAL, N, seed_low, seed_high,
                               threshold, keep_scale, C: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
                               BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """DRESIDUAL: the gradient of `total`, DX: of x, written only with dropout. PARTIAL (programs, 2, C), float32."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for first in range(program * BLOCK_ROWS, N, programs * BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        exists = (rows < N)[:, None] & inside[None, :]
        at = rows[:, None].to(tl.int64) * C + columns[None, :]
        total = tl.load(TOTAL + at, mask=exists, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=exists, other=0.0).to(tl.float32)
        mean = tl.load(STATISTICS + rows, mask=rows < N, other=0.0)[:, None]
        rstd = tl.load(STATISTICS + N + rows, mask=rows < N, other=0.0)[:, None]
        normed = tl.where(exists, (total - mean) * rstd, 0.0)
        dnormed = dy * weight
        along = tl.sum(normed * dnormed, axis=1)[:, None] / C
        dtotal = (dnormed - tl.sum(dnormed, axis=1)[:, None] / C - normed * along) * rstd
        if ADD:
            dtotal += tl.load(DTOTAL + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(DRESIDUAL + at, dtotal.to(DRESIDUAL.dtype.element_ty), mask=exists)
        if DROPOUT:
            dx = tl.where(_keep(seed_low, seed_high, rows, columns, threshold), dtotal * keep_scale, 0.0)
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=exists)
        dweight += dy * normed
        dbias += dy
    partial = PARTIAL + program.to(tl.int64) * 2 * C
    tl.store(partial + columns, tl.sum(dweight, axis=0), mask=inside)
    tl.store(partial + C + columns, tl.sum(dbias, axis=0), mask=inside)


def _forward(x, residual, weight, bias, seed, eps, dropout_p):
    """-> y, total (None without a residual), statistics."""
    x, residual, weight, bias = dense(x, residual, weight, bias)
    N, C = rows_of(x)
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    statistics = torch.empty((2, N), dtype=torch.float32, device=x.device)
    block_rows, options = norm_forward_config(C)
    launch(layer_norm_forward_kernel, triton.cdiv(N, block_rows),
           (x, residual, weight, bias, y, total, statistics, N, eps, *dropout_arguments(dropout_p, seed)),
           {"C": C, "ADD": residual is not None, "HAS_BIAS": bias is not None, "DROPOUT": dropout_p > 0, "BLOCK_ROWS": block_rows,
                "BLOCK_C": triton.next_power_of_2(C)}, **options)
    return y, total, statistics


def _backward(dy, dtotal, total, weight, statistics, seed, dropout_p):
    """dtotal: what else flows into the sum, or None -> dresidual, dx (no elements without dropout), gradients (2, C)."""
    dy, dtotal, weight = dense(dy, dtotal, weight)
    N, C = rows_of(total)
    dresidual, dx = torch.empty_like(total), torch.empty_like(total) if dropout_p else total.new_empty(0)
    block_rows, per_processor, options = norm_backward_config(C)
    programs = min(triton.cdiv(N, block_rows), per_processor * processors(total.device))
    partial = torch.empty((programs, 2, C), dtype=torch.float32, device=total.device)
    launch(layer_norm_backward_kernel, programs,
           (dy, dtotal, total, weight, statistics, dresidual, dx, partial, N, *dropout_arguments(dropout_p, seed)),
           {"C": C, "ADD": dtotal is not None, "DROPOUT": dropout_p > 0, "BLOCK_ROWS": block_rows,
                "BLOCK_C": triton.next_power_of_2(C)}, **options)
    return dresidual, dx, sum_rows(partial.view(programs, 2 * C)).view(2, C).to(weight.dtype)


layer_norm, add_layer_norm = define_layer_norm("triton_", _forward, _backward)

BYTES = {"layer_norm_forward_kernel": "(2 + 2 * ADD) * N * C * e + 8 * N",
         "layer_norm_backward_kernel": "(3 + ADD + DROPOUT) * N * C * e + 8 * N + 8 * programs * C"}


def _inputs(dtype, device, gpt2, shape=(37, 768), add=True):
    N, C = (8192, 768) if gpt2 else shape
    shapes = {"x": (N, C), "residual": (N, C), "weight": (C,), "bias": (C,)}
    if not add:
        del shapes["residual"]
    return {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}, {}


SPECS = [
    Spec("layer_norm", "layer_norm", partial(_inputs, add=False)),
    Spec("layer_norm of 59", "layer_norm", partial(_inputs, shape=(37, 59), add=False)),
    Spec("add_layer_norm", "add_layer_norm", _inputs),
    Spec("add_layer_norm, dropout", "add_layer_norm", partial(_inputs, shape=(5, 1500)), {"dropout_p": 0.2, "seed": 7}),
]
