"""The dropout mask of `fastgpt.reference.dropout_keep_mask`, for any tile: a pure function of (seed, b, h, i, j).

Counter-based, so that backward makes the mask again instead of reading it, and that the CPU's kernels make the same one.
About 9 integer operations an element, a third of Philox's.
"""
import triton
import triton.language as tl

from fastgpt.kernels.launch import words
from fastgpt.reference import dropout_threshold

GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed_low, seed_high, b, h, rows):
    """uint32 keys of the rows (a block of int32) of head h in batch b."""
    key = _mix32(seed_low.to(tl.uint32, bitcast=True) ^ GOLDEN)
    key = _mix32(key ^ seed_high.to(tl.uint32, bitcast=True))
    key = _mix32(key ^ b.to(tl.uint32))
    key = _mix32(key ^ tl.cast(h, tl.uint32))
    return _mix32(key ^ rows.to(tl.uint32))


@triton.jit
def keep_mask(keys, columns, threshold):
    """Which elements are kept: keys and columns broadcast against each other, threshold of 2**32 as a signed word."""
    return _mix32(keys + columns.to(tl.uint32) * GOLDEN) >= threshold.to(tl.uint32, bitcast=True)


def dropout_arguments(dropout_p, seed):
    """The kernels' seed_low, seed_high, threshold and keep_scale."""
    return *words(seed), words(dropout_threshold(dropout_p))[0], 1.0 / (1.0 - dropout_p)
