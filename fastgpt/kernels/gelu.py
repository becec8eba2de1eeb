"""GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), alone or behind a bias, for NVIDIA GPUs.

Backward computes the derivative from x again: keeping it would cost a write and a read of the whole tensor. The tanh form
is x * sigmoid(2 u), the same function with one exponential and no cancellation.
"""
from functools import partial

import torch
import triton
import triton.language as tl

from fastgpt.autograd.gelu import define_gelu
from fastgpt.autograd.tensors import dense, rows_of
from fastgpt.kernels.launch import launch, processors
from fastgpt.kernels.reduce import sum_rows
from fastgpt.kernels.spec import Spec
from fastgpt.kernels.tuning import GELU_BLOCK, GELU_PROGRAMS, GELU_WARPS

LOG2E = tl.constexpr(1.4426950408889634)
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
ONE_OVER_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:
        return x / (1 + tl.exp2((x + x * x * x * CUBIC) * (-2 * ROOT_TWO_OVER_PI * LOG2E)))
    else:
        return 0.5 * x * (1 + tl.erf(x * ROOT_HALF))


@triton.jit
def _gelu_derivative(x, TANH: tl.constexpr):
    if TANH:
        e = tl.exp2((x + x * x * x * CUBIC) * (-2 * ROOT_TWO_OVER_PI * LOG2E))
        half = 1 / (1 + e)
        # half * (1 - half) without its cancellation. Far out x would give infinity times 0
        slope = 2 * half * (half * e)
        return half + tl.where(slope > 0, x * slope * ROOT_TWO_OVER_PI * (1 + x * x * (3 * CUBIC)), 0.0)
    else:
        density = tl.exp2(x * x * (-0.5 * LOG2E)) * ONE_OVER_ROOT_TWO_PI
        return 0.5 * (1 + tl.erf(x * ROOT_HALF)) + tl.where(density > 0, x * density, 0.0)


@triton.jit(do_not_specialize=["rows"])
def gelu_forward_kernel(X, BIAS, Y, rows, columns, HAS_BIAS: tl.constexpr, TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
                        BLOCK_COLUMNS: tl.constexpr):
    """Y = gelu(X + BIAS), X and Y (rows, columns) contiguous, BIAS (columns,)."""
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    column = (tl.program_id(0) % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = (tl.program_id(0) // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    x = tl.load(X + at, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, _gelu(x, TANH).to(Y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(DY, X, BIAS, DX, PARTIAL, rows, columns, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
                         HAS_DBIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """PARTIAL (programs / column blocks, columns), float32: the sum of DX over the rows that a program walks over."""
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    group, groups = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    column = (tl.program_id(0) % blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    if HAS_BIAS:
        bias = tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(group * BLOCK_ROWS, rows, groups * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        exists = (row < rows)[:, None] & inside[None, :]
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(X + at, mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias
        dx = tl.load(DY + at, mask=exists, other=0.0).to(tl.float32) * _gelu_derivative(x, TANH)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=exists)
        if HAS_DBIAS:
            dbias += dx
    if HAS_DBIAS:
        tl.store(PARTIAL + group.to(tl.int64) * columns + column, tl.sum(dbias, axis=0), mask=inside)


def _matrix(x, by_column):
    """(rows, columns, rows and columns of a block): without a meaning of columns one row, while 32 bits can count it."""
    if by_column or x.numel() >= 2 ** 31 - GELU_BLOCK:
        rows, columns = rows_of(x)
        width = min(GELU_BLOCK, triton.next_power_of_2(max(columns, 1)))
        return rows, columns, GELU_BLOCK // width, width
    return 1, x.numel(), 1, GELU_BLOCK


def _forward(x, bias, tanh):
    x, bias = dense(x, bias)
    y = torch.empty_like(x)
    rows, columns, block_rows, block_columns = _matrix(x, bias is not None)
    launch(gelu_forward_kernel, triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns),
           (x, bias, y, rows, columns), {"HAS_BIAS": bias is not None, "TANH": tanh, "BLOCK_ROWS": block_rows,
                                             "BLOCK_COLUMNS": block_columns}, num_warps=GELU_WARPS)
    return y


def _backward(dy, x, bias, tanh, wants_dbias):
    """-> dx, dbias; a dbias that is not wanted has no elements."""
    dy, x, bias = dense(dy, x, bias)
    dx = torch.empty_like(x)
    rows, columns, block_rows, block_columns = _matrix(x, bias is not None or wants_dbias)
    blocks, groups = triton.cdiv(columns, block_columns), triton.cdiv(rows, block_rows)
    if wants_dbias:
        groups = min(groups, triton.cdiv(GELU_PROGRAMS * processors(x.device), max(blocks, 1)))
    partial = torch.empty((groups, columns) if wants_dbias else 0, dtype=torch.float32, device=x.device)
    launch(gelu_backward_kernel, groups * blocks, (dy, x, bias, dx, partial, rows, columns),
           {"HAS_BIAS": bias is not None, "TANH": tanh, "HAS_DBIAS": wants_dbias, "BLOCK_ROWS": block_rows,
                "BLOCK_COLUMNS": block_columns}, num_warps=GELU_WARPS)
    return dx, (sum_rows(partial) if wants_dbias else partial).to(x.dtype)


gelu, bias_gelu = define_gelu("triton_", _forward, _backward)

BYTES = {"gelu_forward_kernel": "2 * rows * columns * e",
         "gelu_backward_kernel": "3 * rows * columns * e + 4 * HAS_DBIAS * programs * BLOCK_COLUMNS"}


def _inputs(dtype, device, gpt2, shape=(300, 300), bias=True):
    rows, columns = (8192, 3072) if gpt2 else shape
    tensors = {"x": torch.randn(rows, columns, dtype=dtype, device=device)}
    return {**tensors, "bias": torch.randn(columns, dtype=dtype, device=device)} if bias else tensors, {}


SPECS = [
    Spec("bias_gelu, tanh", "bias_gelu", _inputs, {"approximate": "tanh"}),
    Spec("bias_gelu", "bias_gelu", _inputs),
    Spec("gelu, tanh", "gelu", partial(_inputs, bias=False), {"approximate": "tanh"}),
]
