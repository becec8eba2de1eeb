"""Causal flash attention, forward, for NVIDIA GPUs (Dao 2023, arXiv:2307.08691); attention_backward.py is the other half.

A program owns BLOCK_M queries of one head and walks over the keys in steps of BLOCK_N, with the softmax's maximum and sum
in registers. The keys that every query sees go through a loop without masks, the diagonal and a window's edge through
one with them. Programs of one head are neighbours, so that its keys stay in the L2 cache, and the longest rows come
first, so that no long one is left for the end.

BYTES counts each tensor once: k and v are read again by every program of a head, but found in the L2 cache.
"""
from functools import partial

import torch
import triton
import triton.language as tl

from fastgpt.autograd.attention import define_attention, define_packed_attention, empty_joinable, empty_lse
from fastgpt.kernels.attention_backward import backward
from fastgpt.kernels.dropout import dropout_arguments, keep_mask, row_keys
from fastgpt.kernels.launch import architecture, launch
from fastgpt.kernels.spec import Spec
from fastgpt.kernels.tiles import (
    block_d,
    chunk,
    head_strides,
    hide_keys,
    key_ranges,
    load_bias,
    load_operand,
    load_rows,
    longest,
    multiply_chunks,
    positive_scale,
    precision,
    program_place,
    sequence,
    store_rows,
    unit_stride,
    visible,
)
from fastgpt.kernels.tuning import attention_config


@triton.jit
def _attend(acc, weight_sum, top, q, K, V, KEY_BIAS, k_row, v_row, begin, end, rows, S, shift, window, scale,
            dropout_keys, threshold, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
            HAS_KEY_BIAS: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
            PRECISION: tl.constexpr, NEGATIVE: tl.constexpr):
    """Takes in the keys begin .. end - 1, begin a multiple of BLOCK_N. top: the maximum so far of the unscaled scores."""
    BLOCK_D: tl.constexpr = acc.shape[1]
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if q.dtype.is_ptr():
            scores = multiply_chunks(q, rows < S - shift, K, start, k_row, S, NEGATIVE, D, BLOCK_N, PRECISION)
        else:
            k = load_rows(K, start, k_row, S, MASKED, D, BLOCK_D, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if HAS_KEY_BIAS:
            scores += load_bias(KEY_BIAS, keys, S, MASKED)[None, :]
        if MASKED:
            seen = visible(rows[:, None], keys[None, :], S, shift, window, CAUSAL, WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top * scale
        if MASKED or HAS_KEY_BIAS:  # a row that has seen no key yet: -inf - -inf would be NaN
            base = tl.where(new_top == float("-inf"), 0.0, base)
        weights = tl.exp2(scores * scale - base[:, None])
        rescale = tl.exp2(top * scale - base)
        weight_sum = weight_sum * rescale + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(keep_mask(dropout_keys[:, None], keys[None, :], threshold), weights, 0.0)
        v = load_rows(V, start, v_row, S, MASKED, D, BLOCK_D, BLOCK_N)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        top = new_top
    return acc, weight_sum, top


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "window"])
def attention_forward_kernel(
        Q, K, V, OUT, LSE, KEY_BIAS, Q_STARTS, K_STARTS, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head,
        v_row, o_batch, o_head, o_row, lse_head, H, T, S, scale, seed_low, seed_high, threshold, keep_scale, window,
        GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
        PACKED: tl.constexpr, DROPOUT: tl.constexpr, HAS_LSE: tl.constexpr, NEGATIVE: tl.constexpr, D: tl.constexpr,
        BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """OUT = softmax(Q K^T * scale) V. GROUP query heads share a key head.

    T and S are the lengths, of packed sequences the longest ones'. lse_head: how many rows LSE holds for a head. scale:
    the scores' times log2(e), without its sign, which is NEGATIVE's. LSE: natural logarithms. window: how many keys a
    query sees, its own included.
    """
    b, h, block, blocks = program_place(T, H, BLOCK_M)
    first_row = (blocks - 1 - block) * BLOCK_M
    q_offset, T = sequence(Q_STARTS, b, q_batch, q_row, T, PACKED)
    if first_row >= T:
        return
    k_offset, _ = sequence(K_STARTS, b, k_batch, k_row, S, PACKED)
    v_offset, S = sequence(K_STARTS, b, v_batch, v_row, S, PACKED)
    if HAS_KEY_BIAS:
        KEY_BIAS += b.to(tl.int64) * S
    shift = S - T
    g = (h // GROUP).to(tl.int64)
    K += k_offset + g * k_head
    V += v_offset + g * v_head
    q = load_operand(Q + q_offset + h.to(tl.int64) * q_head, first_row, q_row, T, NEGATIVE, D, BLOCK_D, CHUNK, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    dropout_keys = row_keys(seed_low, seed_high, b, h, rows) if DROPOUT else rows

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight_sum = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    a, inner, outer, end = key_ranges(first_row, S, shift, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if WINDOW:
        acc, weight_sum, top = _attend(
            acc, weight_sum, top, q, K, V, KEY_BIAS, k_row, v_row, a, inner, rows, S, shift, window, scale, dropout_keys,
            threshold, True, CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_N, PRECISION, NEGATIVE)
    acc, weight_sum, top = _attend(
        acc, weight_sum, top, q, K, V, KEY_BIAS, k_row, v_row, inner, outer, rows, S, shift, window, scale,
        dropout_keys, threshold, False, CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_N, PRECISION, NEGATIVE)
    acc, weight_sum, top = _attend(
        acc, weight_sum, top, q, K, V, KEY_BIAS, k_row, v_row, outer, end, rows, S, shift, window, scale, dropout_keys,
        threshold, True, CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_N, PRECISION, NEGATIVE)

    # A row that sees no key: its sum is 0, its output 0, its log-sum-exp -inf
    empty = weight_sum == 0
    factor = tl.where(empty, 0.0, keep_scale) / tl.where(empty, 1.0, weight_sum)
    # Only now, so that they hold no registers in the loops
    o_offset, _ = sequence(Q_STARTS, b, o_batch, o_row, T, PACKED)
    store_rows(OUT + o_offset + h.to(tl.int64) * o_head, acc * factor[:, None], first_row, o_row, T, D, BLOCK_D, BLOCK_M)
    if HAS_LSE:
        lse_offset, _ = sequence(Q_STARTS, b, tl.cast(H, tl.int64) * lse_head, 1, T, PACKED)
        lse = (top * scale + tl.log2(weight_sum)) * 0.6931471805599453
        lse = tl.where(empty, float("-inf"), lse)
        tl.store(LSE + lse_offset + h.to(tl.int64) * lse_head + rows, lse, mask=rows < T)


def forward(q, k, v, key_mask, seed, causal, scale, dropout_p, window, keep_lse, packing=None):
    """packing: (starts of the queries, of the keys) for batches of one that hold many sequences."""
    q, k, v = unit_stride(q, k, v)
    key_bias, k, v = hide_keys(key_mask, k, v)
    out, lse = empty_joinable(q), empty_lse(q, keep_lse)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    rows, starts = T, (None, None)
    if packing is not None:
        starts, B = packing, len(packing[0]) - 1
        T, S = map(longest, starts)
    block_m, block_n, options = attention_config("forward", architecture(q.device), q.dtype, block_d(D),
                                                 bool(dropout_p or window), key_mask is not None)
    launch(attention_forward_kernel, B * H * triton.cdiv(T, block_m),
           (q, k, v, out, lse, key_bias, *starts, *head_strides(q), *head_strides(k), *head_strides(v),
            *head_strides(out), rows, H, T, S, positive_scale(scale), *dropout_arguments(dropout_p, seed), window),
           {"GROUP": H // G, "CAUSAL": causal, "WINDOW": window > 0, "HAS_KEY_BIAS": key_mask is not None,
                "PACKED": packing is not None, "DROPOUT": dropout_p > 0, "HAS_LSE": keep_lse, "NEGATIVE": scale < 0, "D": D,
                "BLOCK_D": block_d(D), "CHUNK": chunk(q.dtype, D), "BLOCK_M": block_m, "BLOCK_N": block_n,
                "PRECISION": precision(q.dtype)}, **options)
    return out, lse


attention = define_attention("triton_", forward, backward)
packed_attention = define_packed_attention("triton_", forward, backward)

# Of one step over the keys, without the loop inside it where there are chunks
FLOPS = {"attention_forward_kernel": "(2 if CHUNK else 4) * BLOCK_M * BLOCK_N * D"}
BYTES = {"attention_forward_kernel": "2 * B * (H * T + G * S) * D * e + 4 * B * H * T"}


def _inputs(dtype, device, gpt2, heads=(4, 2), lengths=(70, 133), D=24, mask=False):
    """q, k and v, for GPT-2 as views of one tensor. With a mask batch 0's first keys are hidden, and from its first rows all."""
    if gpt2:
        D = max(D, 64)
        qkv = torch.randn(8, 1024, 3 * 12 * D, dtype=dtype, device=device)
        q, k, v = (x.view(8, 1024, 12, D).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        return {"q": q, "k": k, "v": v}, {"key_mask": torch.rand(8, 1024, device=device) > 0.3} if mask else {}
    q, k, v = (torch.randn(2, h, n, D, dtype=dtype, device=device)
               for h, n in ((heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1])))
    key_mask = torch.rand(2, lengths[1], device=device) > 0.3
    key_mask[0, :lengths[1] // 4] = False
    return {"q": q, "k": k, "v": v}, {"key_mask": key_mask} if mask else {}


def _packed_inputs(dtype, device, gpt2):
    lengths, heads, D = ([1024] * 8, (12, 12), 64) if gpt2 else ([0, 70, 1, 79], (4, 2), 24)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    N = sum(lengths)
    q, k, v = (torch.randn(N, h, D, dtype=dtype, device=device) for h in (heads[0], heads[1], heads[1]))
    return {"q": q, "k": k, "v": v}, {"q_starts": starts, "k_starts": starts}


SPECS = [
    Spec("attention", "attention", partial(_inputs, heads=(2, 2), lengths=(130, 130), D=64)),
    Spec("attention D=128", "attention", partial(_inputs, heads=(2, 1), lengths=(33, 97), D=128)),
    Spec("attention D=256", "attention", partial(_inputs, heads=(2, 1), lengths=(33, 97), D=256)),
    Spec("attention D=256, float32", "attention", partial(_inputs, heads=(2, 1), lengths=(33, 70), D=256), dtype=torch.float32),
    Spec("attention D=256, float32, dropout, window", "attention", partial(_inputs, heads=(2, 1), lengths=(33, 70), D=256),
         {"dropout_p": 0.2, "seed": 7, "window": 40, "scale": -0.3}, dtype=torch.float32),
    Spec("attention, GQA", "attention", _inputs),
    Spec("attention, all keys", "attention", partial(_inputs, lengths=(33, 70)), {"causal": False, "scale": -0.3}),
    Spec("attention, key mask", "attention", partial(_inputs, mask=True), {"causal": False}),
    Spec("attention, dropout", "attention", partial(_inputs, D=80), {"dropout_p": 0.2, "seed": 2 ** 40 + 5}),
    Spec("attention, window", "attention", _inputs, {"window": 40}),
    Spec("packed_attention", "packed_attention", _packed_inputs),
]
