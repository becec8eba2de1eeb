"""Causal flash attention, backward, for NVIDIA GPUs: two kernels, each of which owns what it writes.

The first owns queries and gives dq, and the row sums of out * dout that the second needs; that one owns keys, walks over
the queries of all heads that share them, and gives dk and dv. No sum goes through an atomic addition, so that the bits
are the same in every run; the price is that the scores are made twice, 7 products instead of 5.

BYTES counts each tensor once, as in attention.py.
"""
import torch
import triton
import triton.language as tl

from fastgpt.autograd.attention import empty_joinable
from fastgpt.autograd.tensors import dense
from fastgpt.kernels.dropout import dropout_arguments, keep_mask, row_keys
from fastgpt.kernels.launch import architecture, launch
from fastgpt.kernels.tiles import (
    block_d,
    chunk,
    head_strides,
    hide_keys,
    key_ranges,
    load_bias,
    load_lse,
    load_operand,
    load_rows,
    longest,
    multiply_chunks,
    positive_scale,
    precision,
    program_place,
    row_ranges,
    sequence,
    store_rows,
    unit_stride,
    visible,
)
from fastgpt.kernels.tuning import attention_config


@triton.jit
def _add_dq(dq, q, dout, lse, delta, K, V, KEY_BIAS, k_row, v_row, begin, end, rows, S, shift, window, scale,
            dropout_keys, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
            HAS_KEY_BIAS: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
            PRECISION: tl.constexpr, NEGATIVE: tl.constexpr):
    """Adds what the keys begin .. end - 1 give to dq, but for the scale. lse: times log2(e)."""
    BLOCK_D: tl.constexpr = dq.shape[1]
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if q.dtype.is_ptr():
            exist = rows < S - shift
            scores = multiply_chunks(q, exist, K, start, k_row, S, NEGATIVE, D, BLOCK_N, PRECISION)
            dweights = multiply_chunks(dout, exist, V, start, v_row, S, False, D, BLOCK_N, PRECISION)
            k = load_rows(K, start, k_row, S, MASKED, D, BLOCK_D, BLOCK_N)
        else:
            k = load_rows(K, start, k_row, S, MASKED, D, BLOCK_D, BLOCK_N)
            v = load_rows(V, start, v_row, S, MASKED, D, BLOCK_D, BLOCK_N)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if HAS_KEY_BIAS:
            scores += load_bias(KEY_BIAS, keys, S, MASKED)[None, :]
        weights = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            seen = visible(rows[:, None], keys[None, :], S, shift, window, CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        if not q.dtype.is_ptr():
            dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = keep_mask(dropout_keys[:, None], keys[None, :], threshold)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "window"])
def attention_dq_kernel(
        Q, K, V, OUT, DOUT, LSE, DELTA, DQ, KEY_BIAS, Q_STARTS, K_STARTS, q_batch, q_head, q_row, k_batch, k_head, k_row,
        v_batch, v_head, v_row, o_batch, o_head, o_row, do_batch, do_head, do_row, dq_batch, dq_head, dq_row, lse_head, H,
        T, S, scale, signed_scale, seed_low, seed_high, threshold, keep_scale, window, GROUP: tl.constexpr,
        CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, PACKED: tl.constexpr,
        DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    """DQ, and DELTA (as LSE): the row sums of OUT * DOUT. The arguments are those of attention_forward_kernel."""
    b, h, block, blocks = program_place(T, H, BLOCK_M)
    first_row = (blocks - 1 - block) * BLOCK_M
    q_offset, T = sequence(Q_STARTS, b, q_batch, q_row, T, PACKED)
    if first_row >= T:
        return
    o_offset, _ = sequence(Q_STARTS, b, o_batch, o_row, T, PACKED)
    do_offset, _ = sequence(Q_STARTS, b, do_batch, do_row, T, PACKED)
    k_offset, _ = sequence(K_STARTS, b, k_batch, k_row, S, PACKED)
    v_offset, S = sequence(K_STARTS, b, v_batch, v_row, S, PACKED)
    lse_offset, _ = sequence(Q_STARTS, b, tl.cast(H, tl.int64) * lse_head, 1, T, PACKED)
    if HAS_KEY_BIAS:
        KEY_BIAS += b.to(tl.int64) * S
    shift = S - T
    h64, g = h.to(tl.int64), (h // GROUP).to(tl.int64)
    K += k_offset + g * k_head
    V += v_offset + g * v_head
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_operand(Q + q_offset + h64 * q_head, first_row, q_row, T, NEGATIVE, D, BLOCK_D, CHUNK, BLOCK_M)
    DOUT += do_offset + h64 * do_head
    dout = load_rows(DOUT, first_row, do_row, T, True, D, BLOCK_D, BLOCK_M)
    out = load_rows(OUT + o_offset + h64 * o_head, first_row, o_row, T, True, D, BLOCK_D, BLOCK_M)
    at = lse_offset + h64 * lse_head + rows
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if CHUNK:
        dout = load_operand(DOUT, first_row, do_row, T, False, D, BLOCK_D, CHUNK, BLOCK_M)
    tl.store(DELTA + at, delta, mask=rows < T)
    lse = load_lse(LSE + lse_offset + h64 * lse_head, rows, T, HAS_KEY_BIAS)
    dropout_keys = row_keys(seed_low, seed_high, b, h, rows) if DROPOUT else rows

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    a, inner, outer, end = key_ranges(first_row, S, shift, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if WINDOW:
        dq = _add_dq(dq, q, dout, lse, delta, K, V, KEY_BIAS, k_row, v_row, a, inner, rows, S, shift, window, scale,
                     dropout_keys, threshold, keep_scale, True, CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_N,
                     PRECISION, NEGATIVE)
    dq = _add_dq(dq, q, dout, lse, delta, K, V, KEY_BIAS, k_row, v_row, inner, outer, rows, S, shift, window, scale,
                 dropout_keys, threshold, keep_scale, False, CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_N,
                 PRECISION, NEGATIVE)
    dq = _add_dq(dq, q, dout, lse, delta, K, V, KEY_BIAS, k_row, v_row, outer, end, rows, S, shift, window, scale,
                 dropout_keys, threshold, keep_scale, True, CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_N, PRECISION,
                 NEGATIVE)
    # Only now, so that it holds no registers in the loops
    dq_offset, _ = sequence(Q_STARTS, b, dq_batch, dq_row, T, PACKED)
    store_rows(DQ + dq_offset + h64 * dq_head, dq * signed_scale, first_row, dq_row, T, D, BLOCK_D, BLOCK_M)


@triton.jit
def _add_dk_dv(dk, dv, k, v, Q, DOUT, LSE, DELTA, bias, q_row, do_row, begin, end, keys, T, S, shift, window, scale,
               seed_low, seed_high, b, h, threshold, keep_scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
               WINDOW: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
               BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr):
    """Adds what the queries begin .. end - 1 of a head give, dk but for the scale. Tiles are (keys, queries)."""
    BLOCK_D: tl.constexpr = dk.shape[1]
    for start in tl.range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        if k.dtype.is_ptr():
            lse = load_lse(LSE, rows, T, HAS_KEY_BIAS)
            scores = multiply_chunks(k, keys < S, Q, start, q_row, T, NEGATIVE, D, BLOCK_M, PRECISION)
        else:  # in this order: with lse before q sm_80 spills
            q = load_rows(Q, start, q_row, T, True, D, BLOCK_D, BLOCK_M)
            lse = load_lse(LSE, rows, T, HAS_KEY_BIAS)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if HAS_KEY_BIAS:
            scores += bias[:, None]
        weights = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            seen = visible(rows[None, :], keys[:, None], S, shift, window, CAUSAL, WINDOW)
            weights = tl.where(seen, weights, 0.0)
        if k.dtype.is_ptr():
            delta = tl.load(DELTA + rows, mask=rows < T, other=0.0)
            dweights = multiply_chunks(v, keys < S, DOUT, start, do_row, T, False, D, BLOCK_M, PRECISION)
            dout = load_rows(DOUT, start, do_row, T, True, D, BLOCK_D, BLOCK_M)
        else:
            dout = load_rows(DOUT, start, do_row, T, True, D, BLOCK_D, BLOCK_M)
            delta = tl.load(DELTA + rows, mask=rows < T, other=0.0)
            dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        used = weights
        if DROPOUT:
            keep = keep_mask(row_keys(seed_low, seed_high, b, h, rows)[None, :], keys[:, None], threshold)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
            used = tl.where(keep, weights * keep_scale, 0.0)
        dv = tl.dot(used.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
        if k.dtype.is_ptr():
            q = load_rows(Q, start, q_row, T, True, D, BLOCK_D, BLOCK_M)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _add_head(dk, dv, k, v, Q, DOUT, LSE, DELTA, bias, q_head, q_row, do_head, do_row, lse_head, keys, T, S, shift,
              window, scale, seed_low, seed_high, b, h, threshold, keep_scale, a, inner, outer, end, CAUSAL: tl.constexpr,
              WINDOW: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
              BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, NEGATIVE: tl.constexpr):
    """Adds what the queries of head h give."""
    h64 = tl.cast(h, tl.int64)
    Q, DOUT, LSE, DELTA = Q + h64 * q_head, DOUT + h64 * do_head, LSE + h64 * lse_head, DELTA + h64 * lse_head
    dk, dv = _add_dk_dv(dk, dv, k, v, Q, DOUT, LSE, DELTA, bias, q_row, do_row, a, inner, keys, T, S, shift, window,
                        scale, seed_low, seed_high, b, h, threshold, keep_scale, True, CAUSAL, WINDOW, HAS_KEY_BIAS,
                        DROPOUT, D, BLOCK_M, PRECISION, NEGATIVE)
    dk, dv = _add_dk_dv(dk, dv, k, v, Q, DOUT, LSE, DELTA, bias, q_row, do_row, inner, outer, keys, T, S, shift,
                        window, scale, seed_low, seed_high, b, h, threshold, keep_scale, False, CAUSAL, WINDOW,
                        HAS_KEY_BIAS, DROPOUT, D, BLOCK_M, PRECISION, NEGATIVE)
    if WINDOW:
        dk, dv = _add_dk_dv(dk, dv, k, v, Q, DOUT, LSE, DELTA, bias, q_row, do_row, outer, end, keys, T, S, shift,
                            window, scale, seed_low, seed_high, b, h, threshold, keep_scale, True, CAUSAL, WINDOW,
                            HAS_KEY_BIAS, DROPOUT, D, BLOCK_M, PRECISION, NEGATIVE)
    return dk, dv


@triton.jit(do_not_specialize=["seed_low", "seed_high", "threshold", "window"])
def attention_dk_dv_kernel(
        Q, K, V, DOUT, LSE, DELTA, DK, DV, KEY_BIAS, Q_STARTS, K_STARTS, q_batch, q_head, q_row, k_batch, k_head, k_row,
        v_batch, v_head, v_row, do_batch, do_head, do_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, lse_head,
        H, T, S, scale, signed_scale, seed_low, seed_high, threshold, keep_scale, window, GROUP: tl.constexpr,
        CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, PACKED: tl.constexpr,
        DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, LOOP: tl.constexpr):
    """DK and DV of BLOCK_N keys. The first keys come first: under a causal mask they are seen by the most queries.

    LOOP: over the GROUP heads. A loop of one turn costs registers on sm_80; without it sm_90's wgmma wait for each other.
    """
    b, g, block, _ = program_place(S, H // GROUP, BLOCK_N)
    first_key = block * BLOCK_N
    k_offset, S = sequence(K_STARTS, b, k_batch, k_row, S, PACKED)
    if first_key >= S:
        return
    v_offset, _ = sequence(K_STARTS, b, v_batch, v_row, S, PACKED)
    q_offset, _ = sequence(Q_STARTS, b, q_batch, q_row, T, PACKED)
    do_offset, _ = sequence(Q_STARTS, b, do_batch, do_row, T, PACKED)
    lse_offset, T = sequence(Q_STARTS, b, tl.cast(H, tl.int64) * lse_head, 1, T, PACKED)
    if HAS_KEY_BIAS:
        KEY_BIAS += b.to(tl.int64) * S
    shift = S - T
    g64 = g.to(tl.int64)
    keys = first_key + tl.arange(0, BLOCK_N)
    bias = load_bias(KEY_BIAS, keys, S, True) if HAS_KEY_BIAS else keys
    k = load_operand(K + k_offset + g64 * k_head, first_key, k_row, S, NEGATIVE, D, BLOCK_D, CHUNK, BLOCK_N)
    v = load_operand(V + v_offset + g64 * v_head, first_key, v_row, S, False, D, BLOCK_D, CHUNK, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    a, inner, outer, end = row_ranges(first_key, T, S, shift, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    Q, DOUT, LSE, DELTA = Q + q_offset, DOUT + do_offset, LSE + lse_offset, DELTA + lse_offset
    if not LOOP:
        dk, dv = _add_head(dk, dv, k, v, Q, DOUT, LSE, DELTA, bias, q_head, q_row, do_head, do_row, lse_head, keys, T,
                           S, shift, window, scale, seed_low, seed_high, b, g, threshold, keep_scale, a, inner, outer, end,
                           CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_M, PRECISION, NEGATIVE)
    else:
        for h in range(g * GROUP, (g + 1) * GROUP):
            dk, dv = _add_head(dk, dv, k, v, Q, DOUT, LSE, DELTA, bias, q_head, q_row, do_head, do_row, lse_head, keys,
                               T, S, shift, window, scale, seed_low, seed_high, b, h, threshold, keep_scale, a, inner,
                               outer, end, CAUSAL, WINDOW, HAS_KEY_BIAS, DROPOUT, D, BLOCK_M, PRECISION, NEGATIVE)
    # Only now, so that they hold no registers in the loops
    dk_offset, _ = sequence(K_STARTS, b, dk_batch, dk_row, S, PACKED)
    store_rows(DK + dk_offset + g64 * dk_head, dk * signed_scale, first_key, dk_row, S, D, BLOCK_D, BLOCK_N)
    dv_offset, _ = sequence(K_STARTS, b, dv_batch, dv_row, S, PACKED)
    store_rows(DV + dv_offset + g64 * dv_head, dv, first_key, dv_row, S, D, BLOCK_D, BLOCK_N)


def backward(dout, q, k, v, out, lse, key_mask, seed, causal, scale, dropout_p, window, packing=None):
    """-> dq, dk, dv. packing as in `attention.forward`."""
    dout, q, k, v, out = unit_stride(dout, q, k, v, out)
    lse, = dense(lse)
    key_bias, k, v = hide_keys(key_mask, k, v)
    dq, dk, dv, delta = empty_joinable(q), empty_joinable(k), empty_joinable(v), torch.empty_like(lse)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    if H == 0:
        return dq, dk.zero_(), dv.zero_()
    rows, starts = T, (None, None)
    if packing is not None:
        starts, B = packing, len(packing[0]) - 1
        T, S = map(longest, starts)
    arch, width = architecture(q.device), block_d(D)
    # Of float32 the loop over the heads takes registers, too
    busy = bool(dropout_p or window or H > G and q.dtype == torch.float32)
    call = q.dtype, width, busy, key_mask is not None
    numbers = (rows, H, T, S, positive_scale(scale), float(scale), *dropout_arguments(dropout_p, seed), window)
    constants = {"GROUP": H // G, "CAUSAL": causal, "WINDOW": window > 0, "HAS_KEY_BIAS": key_mask is not None,
                     "PACKED": packing is not None, "DROPOUT": dropout_p > 0, "NEGATIVE": scale < 0, "D": D, "BLOCK_D": width,
                     "CHUNK": chunk(q.dtype, D), "PRECISION": precision(q.dtype)}
    inputs = (*head_strides(q), *head_strides(k), *head_strides(v))
    block_m, block_n, options = attention_config("dq", arch, *call)
    launch(attention_dq_kernel, B * H * triton.cdiv(T, block_m),
           (q, k, v, out, dout, lse, delta, dq, key_bias, *starts, *inputs, *head_strides(out), *head_strides(dout),
            *head_strides(dq), *numbers), dict(constants, BLOCK_M=block_m, BLOCK_N=block_n), **options)
    block_m, block_n, options = attention_config("dk_dv", arch, *call)
    launch(attention_dk_dv_kernel, B * G * triton.cdiv(S, block_n),
           (q, k, v, dout, lse, delta, dk, dv, key_bias, *starts, *inputs, *head_strides(dout), *head_strides(dk),
            *head_strides(dv), *numbers), dict(constants, BLOCK_M=block_m, BLOCK_N=block_n, LOOP=H > G or arch in (90, 100)), **options)
    return dq, dk, dv


FLOPS = {"attention_dq_kernel": "(2 if CHUNK else 6) * BLOCK_M * BLOCK_N * D",
         "attention_dk_dv_kernel": "(4 if CHUNK else 8) * BLOCK_M * BLOCK_N * D"}
BYTES = {"attention_dq_kernel": "B * (4 * H * T + 2 * G * S) * D * e + 8 * B * H * T",
         "attention_dk_dv_kernel": "B * (2 * H * T + 4 * G * S) * D * e + 8 * B * H * T"}
