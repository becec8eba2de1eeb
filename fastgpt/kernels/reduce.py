"""The last step of sums over rows: the partial sums of a fixed number of programs, added in their order."""
import torch
import triton
import triton.language as tl

from fastgpt.kernels.launch import launch

BLOCK_ROWS, BLOCK_COLUMNS = 32, 32


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(PARTIAL, SUM, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """SUM (columns,) = the sum of PARTIAL (rows, columns) over its rows, both float32."""
    at = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        exists = (row < rows)[:, None] & (at < columns)[None, :]
        total += tl.load(PARTIAL + row[:, None] * columns + at[None, :], mask=exists, other=0.0)
    tl.store(SUM + at, tl.sum(total, axis=0), mask=at < columns)


def sum_rows(partial):
    """(rows, columns) float32 -> (columns,): zeros when there are no rows."""
    rows, columns = partial.shape
    out = torch.empty(columns, dtype=torch.float32, device=partial.device)
    launch(sum_rows_kernel, triton.cdiv(columns, BLOCK_COLUMNS), (partial, out, rows, columns),
           {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}, num_warps=4)
    return out


BYTES = {"sum_rows_kernel": "4 * rows * columns"}
