"""Layer norm, alone or behind dropout and a residual add, for NVIDIA GPUs (Ba et al. 2016, arXiv:1607.06450).

A row is read once, stays in registers, and gets its mean and then its variance from there, and a correction of the mean:
exact for rows whose mean is large. A row of up to 1024 columns belongs to one warp, so its sums need no shared memory and no barrier.
Backward keeps a fixed number of programs, each walking over its share of the rows with the sums of dweight and dbias in
registers: the partial sums that go through memory do not grow with the rows, and one order of addition is kept.
Rows that do not fit into registers are walked over in blocks of columns, three times, for the mean, the variance and the
result: all but the first time from the L2 cache. Their dweight and dbias have a kernel of their own.
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
from fastgpt.kernels.tuning import (
    NORM_COLUMNS,
    NORM_WIDE,
    WIDEST_NORM_BACKWARD,
    WIDEST_NORM_FORWARD,
    norm_backward_config,
    norm_forward_config,
)


@triton.jit
def _keep(seed_low, seed_high, rows, columns, threshold):
    """The keep-mask of a (rows, columns) matrix: batch and head of the hash are 0."""
    zero = tl.zeros([1], tl.int32)
    return keep_mask(row_keys(seed_low, seed_high, zero, zero, rows)[:, None], columns[None, :], threshold)


@triton.jit
def _total(X, RESIDUAL, TOTAL, at, exists, rows, columns, seed_low, seed_high, threshold, keep_scale, ADD: tl.constexpr,
           DROPOUT: tl.constexpr):
    """dropout(X) + RESIDUAL as TOTAL holds it, which is stored, or X where nothing is added, in float32."""
    x = tl.load(X + at, mask=exists, other=0.0).to(tl.float32)
    if DROPOUT:
        x = tl.where(_keep(seed_low, seed_high, rows, columns, threshold), x * keep_scale, 0.0)
    if ADD:
        x += tl.load(RESIDUAL + at, mask=exists, other=0.0).to(tl.float32)
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, total, mask=exists)
        x = total.to(tl.float32)
    return x


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
    x = _total(X, RESIDUAL, TOTAL, at, exists, rows, columns, seed_low, seed_high, threshold, keep_scale, ADD, DROPOUT)
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


@triton.jit
def _block(row, start, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(columns from `start` on, which of them exist, where they lie in the matrix), the latter two (1, BLOCK_C)."""
    columns = start + tl.arange(0, BLOCK_C)
    return columns, (columns < C)[None, :], row.to(tl.int64) * C + columns[None, :]


@triton.jit(do_not_specialize=["N", "seed_low", "seed_high", "threshold"])
def layer_norm_wide_forward_kernel(X, RESIDUAL, WEIGHT, BIAS, Y, TOTAL, STATISTICS, N, eps, seed_low, seed_high, threshold,
                                   keep_scale, C: tl.constexpr, ADD: tl.constexpr, HAS_BIAS: tl.constexpr,
                                   DROPOUT: tl.constexpr, BLOCK_C: tl.constexpr):
    """`layer_norm_forward_kernel` in blocks of columns: a program has one row."""
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    sums = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns, exists, at = _block(row, start, C, BLOCK_C)
        sums += _total(X, RESIDUAL, TOTAL, at, exists, rows, columns, seed_low, seed_high, threshold, keep_scale, ADD, DROPOUT)
    mean = tl.sum(sums, axis=1)[:, None] / C
    if ADD:
        X = TOTAL
        tl.debug_barrier()  # other threads may have stored what one loads
    sums = tl.zeros([1, BLOCK_C], tl.float32)
    squares = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns, exists, at = _block(row, start, C, BLOCK_C)
        centred = tl.where(exists, tl.load(X + at, mask=exists, other=0.0).to(tl.float32) - mean, 0.0)
        sums += centred
        squares += centred * centred
    rest = tl.sum(sums, axis=1)[:, None] / C
    rstd = 1 / tl.sqrt_rn(tl.sum(squares, axis=1)[:, None] / C - rest * rest + eps)
    for start in range(0, C, BLOCK_C):
        columns, exists, at = _block(row, start, C, BLOCK_C)
        centred = tl.load(X + at, mask=exists, other=0.0).to(tl.float32) - mean
        y = (centred - rest) * rstd * tl.load(WEIGHT + columns[None, :], mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(BIAS + columns[None, :], mask=exists, other=0.0).to(tl.float32)
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=exists)
    tl.store(STATISTICS + rows, tl.reshape(mean + rest, [1]))
    tl.store(STATISTICS + N + rows, tl.reshape(rstd, [1]))


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


@triton.jit
def _normed(TOTAL, DY, WEIGHT, at, columns, exists, mean, rstd):
    """A block of a row behind the norm, before weight and bias, and its gradient."""
    normed = (tl.load(TOTAL + at, mask=exists, other=0.0).to(tl.float32) - mean) * rstd
    dnormed = tl.load(DY + at, mask=exists, other=0.0).to(tl.float32)
    return normed, dnormed * tl.load(WEIGHT + columns[None, :], mask=exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "seed_low", "seed_high", "threshold"])
def layer_norm_wide_backward_kernel(DY, DTOTAL, TOTAL, WEIGHT, STATISTICS, DRESIDUAL, DX, N, seed_low, seed_high, threshold,
                                    keep_scale, C: tl.constexpr, ADD: tl.constexpr, DROPOUT: tl.constexpr,
                                    BLOCK_C: tl.constexpr):
    """`layer_norm_backward_kernel` in blocks of columns but for PARTIAL: a program has one row."""
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    mean, rstd = tl.load(STATISTICS + row), tl.load(STATISTICS + N + row)
    sums = tl.zeros([1, BLOCK_C], tl.float32)
    alongs = tl.zeros([1, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        columns, exists, at = _block(row, start, C, BLOCK_C)
        normed, dnormed = _normed(TOTAL, DY, WEIGHT, at, columns, exists, mean, rstd)
        sums += dnormed
        alongs += normed * dnormed
    lost = tl.sum(sums, axis=1)[:, None] / C
    along = tl.sum(alongs, axis=1)[:, None] / C
    for start in range(0, C, BLOCK_C):
        columns, exists, at = _block(row, start, C, BLOCK_C)
        normed, dnormed = _normed(TOTAL, DY, WEIGHT, at, columns, exists, mean, rstd)
        dtotal = (dnormed - lost - normed * along) * rstd
        if ADD:
            dtotal += tl.load(DTOTAL + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(DRESIDUAL + at, dtotal.to(DRESIDUAL.dtype.element_ty), mask=exists)
        if DROPOUT:
            dx = tl.where(_keep(seed_low, seed_high, rows, columns, threshold), dtotal * keep_scale, 0.0)
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["N"])
def layer_norm_columns_kernel(DY, TOTAL, STATISTICS, PARTIAL, N, C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                              BLOCK_C: tl.constexpr):
    """PARTIAL (programs / column blocks, 2, C), float32: as the narrow rows' kernel has it, of a program's block of columns."""
    blocks = tl.cdiv(C, BLOCK_C)
    group, groups = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    columns = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for first in range(group * BLOCK_ROWS, N, groups * BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        exists = (rows < N)[:, None] & inside[None, :]
        at = rows[:, None].to(tl.int64) * C + columns[None, :]
        mean = tl.load(STATISTICS + rows, mask=rows < N, other=0.0)[:, None]
        rstd = tl.load(STATISTICS + N + rows, mask=rows < N, other=0.0)[:, None]
        dy = tl.load(DY + at, mask=exists, other=0.0).to(tl.float32)
        dweight += dy * ((tl.load(TOTAL + at, mask=exists, other=0.0).to(tl.float32) - mean) * rstd)
        dbias += dy
    partial = PARTIAL + group.to(tl.int64) * 2 * C
    tl.store(partial + columns, tl.sum(dweight, axis=0), mask=inside)
    tl.store(partial + C + columns, tl.sum(dbias, axis=0), mask=inside)


def _forward(x, residual, weight, bias, seed, eps, dropout_p):
    """-> y, total (None without a residual), statistics."""
    x, residual, weight, bias = dense(x, residual, weight, bias)
    N, C = rows_of(x)
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    statistics = torch.empty((2, N), dtype=torch.float32, device=x.device)
    arguments = x, residual, weight, bias, y, total, statistics, N, eps, *dropout_arguments(dropout_p, seed)
    constants = {"C": C, "ADD": residual is not None, "HAS_BIAS": bias is not None, "DROPOUT": dropout_p > 0}
    if C > WIDEST_NORM_FORWARD:
        block, options = NORM_WIDE
        launch(layer_norm_wide_forward_kernel, N, arguments, dict(constants, BLOCK_C=block), **options)
    else:
        block_rows, options = norm_forward_config(C)
        launch(layer_norm_forward_kernel, triton.cdiv(N, block_rows), arguments,
               dict(constants, BLOCK_ROWS=block_rows, BLOCK_C=triton.next_power_of_2(C)), **options)
    return y, total, statistics


def _backward(dy, dtotal, total, weight, statistics, seed, dropout_p):
    """dtotal: what else flows into the sum, or None -> dresidual, dx (no elements without dropout), gradients (2, C)."""
    dy, dtotal, weight = dense(dy, dtotal, weight)
    N, C = rows_of(total)
    dresidual, dx = torch.empty_like(total), torch.empty_like(total) if dropout_p else total.new_empty(0)
    constants = {"C": C, "ADD": dtotal is not None, "DROPOUT": dropout_p > 0}
    if C > WIDEST_NORM_BACKWARD:
        block, options = NORM_WIDE
        launch(layer_norm_wide_backward_kernel, N,
               (dy, dtotal, total, weight, statistics, dresidual, dx, N, *dropout_arguments(dropout_p, seed)),
               dict(constants, BLOCK_C=block), **options)
        return dresidual, dx, _column_sums(dy, total, statistics).to(weight.dtype)
    block_rows, per_processor, options = norm_backward_config(C)
    programs = min(triton.cdiv(N, block_rows), per_processor * processors(total.device))
    partial = torch.empty((programs, 2, C), dtype=torch.float32, device=total.device)
    launch(layer_norm_backward_kernel, programs,
           (dy, dtotal, total, weight, statistics, dresidual, dx, partial, N, *dropout_arguments(dropout_p, seed)),
           dict(constants, BLOCK_ROWS=block_rows, BLOCK_C=triton.next_power_of_2(C)), **options)
    return dresidual, dx, sum_rows(partial.view(programs, 2 * C)).view(2, C).to(weight.dtype)


def _column_sums(dy, total, statistics):
    """dweight and dbias (2, C), float32."""
    N, C = rows_of(total)
    block_rows, block, per_processor, options = NORM_COLUMNS
    blocks = triton.cdiv(C, block)
    groups = min(triton.cdiv(N, block_rows), triton.cdiv(per_processor * processors(total.device), blocks))
    partial = torch.empty((groups, 2, C), dtype=torch.float32, device=total.device)
    launch(layer_norm_columns_kernel, groups * blocks, (dy, total, statistics, partial, N),
           {"C": C, "BLOCK_ROWS": block_rows, "BLOCK_C": block}, **options)
    return sum_rows(partial.view(groups, 2 * C)).view(2, C)


layer_norm, add_layer_norm = define_layer_norm("triton_", _forward, _backward)

BYTES = {"layer_norm_forward_kernel": "(2 + 2 * ADD) * N * C * e + 8 * N",
         "layer_norm_wide_forward_kernel": "(2 + 2 * ADD) * N * C * e + 8 * N",
         "layer_norm_backward_kernel": "(3 + ADD + DROPOUT) * N * C * e + 8 * N + 8 * programs * C",
         "layer_norm_wide_backward_kernel": "(3 + ADD + DROPOUT) * N * C * e + 8 * N",
         "layer_norm_columns_kernel": "2 * N * C * e + 8 * N + 8 * programs * BLOCK_C"}
# What is read again, which BYTES leaves out
REREAD = {"layer_norm_wide_forward_kernel": "2 * N * C * e", "layer_norm_wide_backward_kernel": "2 * N * C * e"}


def _inputs(dtype, device, gpt2, shape=(37, 768), add=True, large=(8192, 768)):
    N, C = large if gpt2 else shape
    shapes = {"x": (N, C), "residual": (N, C), "weight": (C,), "bias": (C,)}
    if not add:
        del shapes["residual"]
    return {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}, {}


SPECS = [
    Spec("layer_norm", "layer_norm", partial(_inputs, add=False)),
    Spec("layer_norm of 59", "layer_norm", partial(_inputs, shape=(37, 59), add=False)),
    Spec("add_layer_norm", "add_layer_norm", _inputs),
    Spec("add_layer_norm, dropout", "add_layer_norm", partial(_inputs, shape=(5, 1500)), {"dropout_p": 0.2, "seed": 7}),
    Spec("layer_norm, wide", "layer_norm", partial(_inputs, shape=(3, 8200), add=False, large=(1024, 32768))),
    Spec("add_layer_norm, wide, dropout", "add_layer_norm", partial(_inputs, shape=(5, 16500), large=(1024, 32768)),
         {"dropout_p": 0.2, "seed": 7}),
]
