"""The weights of attention for chosen heads and rows, e**(score - lse), for NVIDIA GPUs.

A program makes a tile of the result, BLOCK_M chosen rows by BLOCK_N keys, and writes it once. Neighbours have the same rows,
so that they write one after another, and find the queries in the L2 cache. Tiles of which no key is seen are zeros without
a look at q and k.

BYTES counts each tensor once.
"""
import torch
import triton
import triton.language as tl

from fastgpt.autograd.attention import define_attention_weights, empty_weights
from fastgpt.autograd.tensors import dense
from fastgpt.kernels.launch import launch
from fastgpt.kernels.spec import Spec
from fastgpt.kernels.tiles import (
    head_strides,
    load_lse,
    multiply_chunks,
    positive_scale,
    precision,
    unit_stride,
    visible,
)
from fastgpt.kernels.tuning import attention_weights_config


@triton.jit(do_not_specialize=["window"])
def attention_weights_kernel(
        Q, K, LSE, KEY_MASK, HEADS, ROWS, OUT, q_batch, q_head, q_row, k_batch, k_head, k_row, H, T, S, heads, rows, scale,
        window, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
        NEGATIVE: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        PRECISION: tl.constexpr):
    """OUT (B, heads, rows, S), of the heads that HEADS and the rows that ROWS names. GROUP query heads share a key head.

    scale: the scores' times log2(e), without its sign, which is NEGATIVE's. window: how many keys a query sees, its own
    included.
    """
    row_blocks, key_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(S, BLOCK_N)
    block = tl.program_id(0) // key_blocks
    first_key = tl.program_id(0) % key_blocks * BLOCK_N
    head = (block // row_blocks).to(tl.int64)  # of OUT
    places = block % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b, h = head // heads, tl.load(HEADS + head % heads)
    # A place beyond the last has row T, which is none
    own = tl.load(ROWS + places, mask=places < rows, other=T).to(tl.int32)
    keys = first_key + tl.arange(0, BLOCK_N)
    seen = visible(own[:, None], keys[None, :], S, S - T, window, CAUSAL, WINDOW)
    seen = seen & (places < rows)[:, None]
    if HAS_KEY_MASK:
        seen = seen & (tl.load(KEY_MASK + b * S + keys, mask=keys < S, other=0) != 0)[None, :]
    OUT += (head * rows + places)[:, None] * S + keys[None, :]
    exists = (places < rows)[:, None] & (keys < S)[None, :]
    if tl.max(tl.max(seen.to(tl.int32), 1), 0) == 0:
        tl.store(OUT, tl.zeros([BLOCK_M, BLOCK_N], OUT.dtype.element_ty), mask=exists)
        return
    q = Q + b * q_batch + h * q_head + own.to(tl.int64)[:, None] * q_row + tl.arange(0, CHUNK)[None, :]
    K += b * k_batch + h // GROUP * k_head
    scores = multiply_chunks(q, own < T, K, first_key, k_row, S, NEGATIVE, D, BLOCK_N, PRECISION)
    lse = load_lse(LSE + (b * H + h) * T, own, T, True)
    weights = tl.where(seen, tl.exp2(scores * scale - lse[:, None]), 0.0)
    tl.store(OUT, weights.to(OUT.dtype.element_ty), mask=exists)


def weights(q, k, lse, heads, rows, key_mask, causal, scale, window):
    q, k = unit_stride(q, k)
    lse, key_mask = dense(lse, key_mask)
    out = empty_weights(q, k, heads, rows)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    block_m, block_n, chunk, options = attention_weights_config(q.dtype)
    launch(attention_weights_kernel, B * len(heads) * triton.cdiv(len(rows), block_m) * triton.cdiv(S, block_n),
           (q, k, lse, key_mask if key_mask is None else key_mask.view(torch.uint8), heads, rows, out, *head_strides(q),
            *head_strides(k), H, T, S, len(heads), len(rows), positive_scale(scale), window),
           {"GROUP": H // G, "CAUSAL": causal, "WINDOW": window > 0, "HAS_KEY_MASK": key_mask is not None,
            "NEGATIVE": scale < 0, "D": D, "CHUNK": chunk, "BLOCK_M": block_m, "BLOCK_N": block_n,
            "PRECISION": precision(q.dtype)}, **options)
    return out


attention_weights = define_attention_weights("triton_", weights)

BYTES = {"attention_weights_kernel": "B * (heads * rows * (D + S) + G * S * D) * e + 4 * B * heads * rows"}


def _inputs(dtype, device, gpt2):
    """No tensors with gradients. All weights of a layer, q and k as views of one tensor."""
    B, T, H = (8, 1024, 12) if gpt2 else (2, 70, 2)
    q, k, _ = torch.randn(B, T, 3, H, 64, dtype=dtype, device=device).permute(2, 0, 3, 1, 4)
    return {}, {"q": q, "k": k, "lse": torch.full((B, H, T), 9.0, device=device)}


INFERENCE_SPECS = [Spec("attention weights", "attention_weights", _inputs)]
