"""Causal flash attention over the pages of a KV cache, for many queries a sequence (prefill), on NVIDIA GPUs; no backward.

As attention.py's forward, but that keys are found through a sequence's block table. Where a page holds whole tiles of keys
one table entry serves a tile; otherwise each key has its own. Either way the sums over the keys are the same, so that a
row's bits depend on no page size.

A page number that no page has is never followed. A look at the table before the loop without masks finds one there, and
then the loop with masks takes its keys too, where such a key's score is NaN for the rows that see it.

BYTES counts each tensor once: k and v are read again by every program of a head, but found in the L2 cache.
"""
from functools import partial

import torch
import triton
import triton.language as tl

from fastgpt.kernels.launch import architecture, launch
from fastgpt.kernels.spec import Spec
from fastgpt.kernels.tiles import (
    block_d,
    chunk,
    key_ranges,
    load_operand,
    positive_scale,
    precision,
    program_place,
    store_rows,
    visible,
)
from fastgpt.kernels.tuning import prefill_config

ENTRIES = tl.constexpr(512)  # of a table that are looked at together
FLOAT8_UNIT = 256  # what float8's bits count for, moved to those of float16: its exponent's bias is 8 less
# Weights are 2**6 times as large before they meet the scales of v, so that in float16 their products stay normal numbers;
# 2**6 times the largest scale, 65504 / 127, is one still. The sum of weights takes it out again.
WEIGHT_BITS = tl.constexpr(6)


@triton.jit
def _largest_page(TABLE, begin, end, PAGE_SIZE: tl.constexpr):
    """The largest number, as unsigned, of the pages with the keys begin .. end - 1."""
    largest = tl.cast(0, tl.uint32)
    last = tl.where(begin < end, tl.cdiv(end, PAGE_SIZE), 0)
    for first in tl.range(begin // PAGE_SIZE, last, ENTRIES, num_stages=1):
        entries = first + tl.arange(0, ENTRIES)
        pages = tl.load(TABLE + entries, mask=entries < last, other=0)
        largest = tl.maximum(largest, tl.max(pages.to(tl.uint32, bitcast=True), 0))
    return largest


@triton.jit
def _load_page(TABLE, start, S, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the keys from `start` on: one, or one for each key. Those beyond S have the last key's."""
    if PAGE_SIZE % BLOCK_N == 0:
        keys = start
    else:
        keys = start + tl.arange(0, BLOCK_N)
    return tl.load(TABLE + tl.maximum(tl.minimum(keys, S - 1), 0) // PAGE_SIZE)


@triton.jit
def _rows_at(X, page, start, PAGE_STRIDE: tl.constexpr, ROW: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the rows of BLOCK_N keys from `start` on begin."""
    i = tl.arange(0, BLOCK_N)
    X += page.to(tl.int64) * PAGE_STRIDE
    if PAGE_SIZE % BLOCK_N == 0:
        return X + start % PAGE_SIZE * ROW + i * ROW
    else:
        return X + (start + i) % PAGE_SIZE * ROW


@triton.jit
def _load_tile(at, exists, OTHER: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_N, BLOCK_D) of the rows at `at`, zeros beyond WIDTH; OTHER for a row that does not exist (if MASKED)."""
    d = tl.arange(0, BLOCK_D)
    at = at[:, None] + d[None, :]
    if MASKED and WIDTH < BLOCK_D:
        x = tl.load(at, mask=exists[:, None] & (d < WIDTH)[None, :], other=0)
        return x if OTHER == 0 else tl.where(exists[:, None], x, OTHER)
    elif MASKED:
        return tl.load(at, mask=exists[:, None], other=OTHER)
    elif WIDTH < BLOCK_D:
        return tl.load(at, mask=(d < WIDTH)[None, :], other=0)
    else:
        return tl.load(at)


@triton.jit
def _load_scales(at, exists, OTHER: tl.constexpr, MASKED: tl.constexpr):
    return tl.load(at, mask=exists, other=OTHER) if MASKED else tl.load(at)


@triton.jit
def _converted(x, FLOAT8: tl.constexpr, DTYPE: tl.constexpr):
    """A tile in the dtype of the queries. FLOAT8: of float8_e4m3fn's bits as int8, in units of 256."""
    if FLOAT8:  # moved, the sign is there twice
        return ((x.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True).to(DTYPE)
    elif x.dtype == tl.int8 and DTYPE == tl.float16:  # the bits of 1152 + x; to convert it takes 4 times as long on sm_80
        return (x.to(tl.int16) & 0xFF ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    else:
        return x.to(DTYPE)


@triton.jit
def _multiply_chunks(q, rows_exist, at, exists, OTHER: tl.constexpr, NEGATIVE: tl.constexpr, FLOAT8: tl.constexpr,
                     D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """`tiles.multiply_chunks` with the rows of a cache at `at`; OTHER in those that do not exist."""
    CHUNK: tl.constexpr = q.shape[1]
    d = tl.arange(0, CHUNK)
    scores = tl.zeros([q.shape[0], at.shape[0]], tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=1):
        x = tl.load(q + start, mask=rows_exist[:, None] & (start + d < D)[None, :], other=0.0)
        k = tl.load(at[:, None] + start + d[None, :], mask=exists[:, None] & (start + d < WIDTH)[None, :], other=0)
        k = tl.where(exists[:, None], _converted(k, FLOAT8, x.dtype), OTHER)
        scores = tl.dot(x, tl.trans(k), scores, input_precision=PRECISION)
    return -scores if NEGATIVE else scores


@triton.jit
def _attend(acc, weight_sum, top, q, K, V, K_SCALE, V_SCALE, TABLE, begin, end, rows, S, shift, window, scale, pages,
            MASKED: tl.constexpr, WINDOW: tl.constexpr, QUANTISED: tl.constexpr, FLOAT8: tl.constexpr,
            PAGE_SIZE: tl.constexpr, PAGE_STRIDE: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr,
            SCALE_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, T, NEGATIVE: tl.constexpr,
            D: tl.constexpr, DTYPE: tl.constexpr):
    """Takes in the keys begin .. end - 1, begin a multiple of BLOCK_N. top: the maximum so far of the unscaled scores."""
    BLOCK_D: tl.constexpr = acc.shape[1]
    # A score of NaN: of a key that is not there at all no row sees it
    K_OTHER: tl.constexpr = 0 if QUANTISED else float("nan")
    if not MASKED:
        next_page = _load_page(TABLE, begin, S, PAGE_SIZE, BLOCK_N)
    # One stage with masks: copies ahead, for a tile or two, would take registers from the other loop
    for start in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED else None):
        keys = start + tl.arange(0, BLOCK_N)
        if MASKED:
            page = _load_page(TABLE, start, S, PAGE_SIZE, BLOCK_N)
            known = page.to(tl.uint32, bitcast=True) < pages
            exists = keys < tl.where(known, S, 0)
            page = tl.where(known, page, 0)
        else:  # the next tile's, so that nothing waits for it
            exists = keys < S
            page = next_page
            next_page = _load_page(TABLE, start + BLOCK_N, S, PAGE_SIZE, BLOCK_N)
        at = _rows_at(K, page, start, PAGE_STRIDE, ROW, PAGE_SIZE, BLOCK_N)
        if q.dtype.is_ptr():
            scores = _multiply_chunks(q, rows < T, at, exists, K_OTHER, NEGATIVE, FLOAT8, D, WIDTH, PRECISION)
        else:
            k = _converted(_load_tile(at, exists, K_OTHER, MASKED, WIDTH, BLOCK_D), FLOAT8, DTYPE)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if QUANTISED:
            at = _rows_at(K_SCALE, page, start, SCALE_STRIDE, 1, PAGE_SIZE, BLOCK_N)
            scores *= _load_scales(at, exists, float("nan"), MASKED)[None, :]
        if MASKED:
            seen = visible(rows[:, None], keys[None, :], S, shift, window, True, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top * scale
        if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
            base = tl.where(new_top == float("-inf"), 0.0, base)
        rescale = tl.exp2(top * scale - base)
        if QUANTISED:
            base -= WEIGHT_BITS
        weights = tl.exp2(scores * scale - base[:, None])
        weight_sum = weight_sum * rescale + tl.sum(weights, 1)
        if QUANTISED:
            at = _rows_at(V_SCALE, page, start, SCALE_STRIDE, 1, PAGE_SIZE, BLOCK_N)
            weights *= _load_scales(at, exists, 0.0, MASKED)[None, :]
        at = _rows_at(V, page, start, PAGE_STRIDE, ROW, PAGE_SIZE, BLOCK_N)
        v = _converted(_load_tile(at, exists, 0, MASKED, WIDTH, BLOCK_D), FLOAT8, DTYPE)
        acc = tl.dot(weights.to(DTYPE), v, acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    return acc, weight_sum, top


@triton.jit(do_not_specialize=["table_stride", "max_query", "capacity", "pages", "window"])
def paged_prefill_kernel(
        Q, K, V, OUT, K_SCALE, V_SCALE, TABLES, QUERY_STARTS, CONTEXT_LENS, q_row, q_head, o_row, o_head, table_stride, H,
        max_query, capacity, pages, scale, window, GROUP: tl.constexpr, WINDOW: tl.constexpr, QUANTISED: tl.constexpr,
        FLOAT8: tl.constexpr, UNIT: tl.constexpr, NEGATIVE: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
        PAGE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr,
        SCALE_PAGE: tl.constexpr, SCALE_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """OUT = softmax(Q K^T * scale) V of the last query rows of each sequence. GROUP query heads share a key head.

    capacity: how many keys a block table has pages for; rows that see more are NaN. scale: the scores' times log2(e), and
    times the UNIT of a float8 number, without its sign, which is NEGATIVE's. window: how many keys a query sees, its own
    included. Strides in elements: of K and V PAGE_STRIDE, HEAD_STRIDE and ROW, of whose elements WIDTH can be loaded.
    """
    s, h, block, blocks = program_place(max_query, H, BLOCK_M)
    first_row = (blocks - 1 - block) * BLOCK_M
    first_query = tl.load(QUERY_STARTS + s)
    T = tl.load(QUERY_STARTS + s + 1) - first_query
    if first_row >= T:
        return
    S = tl.load(CONTEXT_LENS + s)
    shift = S - T
    S = tl.minimum(S, capacity)
    g = (h // GROUP).to(tl.int64)
    K += g * HEAD_STRIDE
    V += g * HEAD_STRIDE
    if QUANTISED:
        K_SCALE += g * SCALE_HEAD
        V_SCALE += g * SCALE_HEAD
    TABLE = TABLES + s.to(tl.int64) * table_stride
    pages = pages.to(tl.uint32)
    Q += first_query.to(tl.int64) * q_row + h.to(tl.int64) * q_head
    q = load_operand(Q, first_row, q_row, T, NEGATIVE, D, BLOCK_D, CHUNK, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    a, inner, outer, end = key_ranges(first_row, S, shift, window, True, WINDOW, BLOCK_M, BLOCK_N)
    outer = tl.where(_largest_page(TABLE, inner, outer, PAGE_SIZE) >= pages, inner, outer)
    if WINDOW:
        acc, weight_sum, top = _attend(
            acc, weight_sum, top, q, K, V, K_SCALE, V_SCALE, TABLE, a, inner, rows, S, shift, window, scale, pages, True,
            WINDOW, QUANTISED, FLOAT8, PAGE_SIZE, PAGE_STRIDE, ROW, WIDTH, SCALE_PAGE, BLOCK_N, PRECISION,
            T, NEGATIVE, D, Q.dtype.element_ty)
    acc, weight_sum, top = _attend(
        acc, weight_sum, top, q, K, V, K_SCALE, V_SCALE, TABLE, inner, outer, rows, S, shift, window, scale, pages, False,
        WINDOW, QUANTISED, FLOAT8, PAGE_SIZE, PAGE_STRIDE, ROW, WIDTH, SCALE_PAGE, BLOCK_N, PRECISION,
        T, NEGATIVE, D, Q.dtype.element_ty)
    acc, weight_sum, top = _attend(
        acc, weight_sum, top, q, K, V, K_SCALE, V_SCALE, TABLE, outer, end, rows, S, shift, window, scale, pages, True,
        WINDOW, QUANTISED, FLOAT8, PAGE_SIZE, PAGE_STRIDE, ROW, WIDTH, SCALE_PAGE, BLOCK_N, PRECISION,
        T, NEGATIVE, D, Q.dtype.element_ty)

    # A row that sees no key: its sum is 0, its output 0
    empty = weight_sum == 0
    factor = tl.where(empty, 0.0, UNIT) / tl.where(empty, 1.0, weight_sum)
    # Loaded again, so that they hold no registers in the loops
    first_query = tl.load(QUERY_STARTS + s)
    T = tl.load(QUERY_STARTS + s + 1) - first_query
    factor = tl.where(rows + tl.load(CONTEXT_LENS + s) - T < capacity, factor, float("nan"))
    OUT += first_query.to(tl.int64) * o_row + h.to(tl.int64) * o_head
    store_rows(OUT, acc * factor[:, None], first_row, o_row, T, D, BLOCK_D, BLOCK_M)


def prefill(q, k, v, k_scale, v_scale, block_tables, query_starts, context_lens, max_query, *, scale=None, window=0,
            out=None):
    """Causal attention of the last queries of sequences whose keys and values are in a paged cache -> out (N, H, D).

    q (N, H, D), out likewise, their rows contiguous: those of sequence s are query_starts[s] .. query_starts[s + 1] - 1, max_query at most.
    k, v (pages, G, page_size, D) of one dtype and strides, rows contiguous, of any floating dtype, or int8 or float8_e4m3fn
    with scales (pages, G, page_size); behind D, up to a multiple of 16 bytes, a row may be longer, by zeros. block_tables
    (S, P), query_starts (S + 1,), context_lens (S,): int32, on q's device, where alone they are read. scale: of the scores,
    by default D ** -0.5; window: how many keys a query sees, its own included, or 0 for all. Rows that see a key whose page
    is not in [0, pages), or not in the table, are NaN.
    """
    (_, H, D), (pages, G, page_size, _) = q.shape, k.shape
    if k.stride() != v.stride() or k.stride(3) != 1 or k_scale is not None and k_scale.stride() != v_scale.stride():
        raise ValueError("a paged cache's k and v, and their scales, must have the same strides, and contiguous rows")
    scale = D ** -0.5 if scale is None else scale
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    capacity = min(block_tables.shape[1] * page_size, 2 ** 31 - 1)
    if not pages or not capacity:
        return out.fill_(float("nan"))
    float8, quantised = k.dtype == torch.float8_e4m3fn, k_scale is not None
    unit = FLOAT8_UNIT if float8 else 1
    k, v = (_padded(x, D) for x in (k, v))
    scale_page, scale_head = k_scale.stride()[:2] if quantised else (0, 0)
    block_m, block_n, options = prefill_config(architecture(q.device), q.dtype, block_d(D), window > 0, quantised)
    launch(paged_prefill_kernel, len(context_lens) * H * triton.cdiv(max_query, block_m),
           (q, k, v, out, k_scale, v_scale, block_tables, query_starts, context_lens, *q.stride()[:2], *out.stride()[:2],
            block_tables.stride(0), H, max_query, capacity, pages, positive_scale(scale * unit), window),
           {"GROUP": H // G, "WINDOW": window > 0, "QUANTISED": quantised, "FLOAT8": float8, "UNIT": unit,
            "NEGATIVE": scale < 0, "D": D, "PAGE_SIZE": page_size, "PAGE_STRIDE": k.stride(0), "HEAD_STRIDE": k.stride(1),
            "ROW": k.stride(2), "WIDTH": k.shape[3], "SCALE_PAGE": scale_page, "SCALE_HEAD": scale_head, "BLOCK_D": block_d(D),
            "CHUNK": chunk(q.dtype, D), "BLOCK_M": block_m, "BLOCK_N": block_n, "PRECISION": precision(q.dtype)}, **options)
    return out


def _padded(x, D):
    """A cache's k or v with the zeros behind D, so that all loads are of 16 bytes, where the rows have them; float8 as int8."""
    unit = 16 // x.element_size()
    x = x.as_strided((*x.shape[:3], min(-(-D // unit) * unit, x.stride(2))), x.stride())
    return x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x


# Of one step over the keys, without the loop inside it where there are chunks
FLOPS = {"paged_prefill_kernel": "(2 if CHUNK else 4) * BLOCK_M * BLOCK_N * D"}
BYTES = {"paged_prefill_kernel": "2 * (rows * H * D + pages * G * PAGE_SIZE * D) * e"}


def _inputs(dtype, device, gpt2, D=64):
    """No tensors with gradients. q as a view of one tensor with k and v; the cache's pages are those of the sequences."""
    count, T, H, page_size = (8, 1024, 12, 64) if gpt2 else (2, 70, 2, 16)
    q = torch.randn(count * T, 3 * H, D, dtype=dtype, device=device)[:, :H]
    P = triton.cdiv(T, page_size)
    k, v = torch.randn(2, count * P, H, page_size, D, dtype=dtype, device=device)
    tables, starts = (torch.arange(0, end, step, dtype=torch.int32, device=device)
                      for end, step in ((count * P, 1), (count * T + 1, T)))
    lens = torch.full((count,), T, dtype=torch.int32, device=device)
    return {}, {"q": q, "k": k, "v": v, "k_scale": None, "v_scale": None, "block_tables": tables.view(count, P),
                "query_starts": starts, "context_lens": lens, "max_query": T}


INFERENCE_SPECS = [
    Spec("paged prefill", "paged_attention", _inputs, launcher=prefill),
    Spec("paged prefill D=128", "paged_attention", partial(_inputs, D=128), launcher=prefill),
    Spec("paged prefill D=256, float32", "paged_attention", partial(_inputs, D=256), launcher=prefill, dtype=torch.float32),
]
