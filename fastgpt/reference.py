"""Every op in plain differentiable PyTorch: the truth in tests (float64), the fallback, the baseline in benchmarks.

Shapes: B batch, H query heads, G key/value heads, T query length, S key length, D head size, C channels, V vocabulary.
The functions take any floating dtype and do no argument checks: `fastgpt.ops` does those once, at the border.
"""
import functools

import torch
import torch.nn.functional as F

from fastgpt import paged

GELU_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}
_GOLDEN = 0x9E3779B9


def layer_norm(x, weight, bias=None, eps=1e-5):
    parameters = [t for t in (weight, bias) if t is not None]
    if all(p.dtype == x.dtype for p in parameters):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = functools.reduce(torch.promote_types, (p.dtype for p in parameters), x.dtype)
    return F.layer_norm(x.to(wide), (x.shape[-1],), *(p.to(wide) for p in parameters), eps=eps).to(x.dtype)


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5, *, dropout_p=0.0, seed=0):
    total = dropout(x, dropout_p, seed) + residual
    return layer_norm(total, weight, bias, eps), total


def dropout(x, dropout_p, seed):
    """x (..., C) with each element dropped or multiplied by 1 / (1 - dropout_p)."""
    if dropout_p == 0.0:
        return x
    C = x.shape[-1]
    keep = dropout_keep_mask(seed, dropout_p, 1, 1, x.numel() // C, C, device=x.device).view(x.shape)
    return x * keep / (1.0 - dropout_p)


def gelu(x, approximate="none"):
    return F.gelu(x, approximate=approximate)


def bias_gelu(x, bias, approximate="none"):
    return F.gelu(x + bias, approximate=approximate)


def linear(x, weight, bias=None, *, activation=None, residual=None):
    y = F.linear(x, weight, bias)
    if activation == "relu":
        y = F.relu(y)
    elif activation is not None:
        y = F.gelu(y, approximate=GELU_APPROXIMATION[activation])
    return y if residual is None else y + residual


def attention(q, k, v, *, causal=True, scale=None, dropout_p=0.0, key_mask=None, seed=0, window=None, return_lse=False,
              first_batch=0):
    """q (B, H, T, D), k and v (B, G, S, D), key_mask (B, S) bool -> (B, H, T, D). See `fastgpt.ops.attention`.

    first_batch: the number of the first batch for the dropout mask.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)) * (D ** -0.5 if scale is None else scale)  # (B, H, T, S)
    visible = attention_mask(T, S, causal, key_mask, q.device, window)
    # A row that sees no key has the output 0, not NaN: -inf everywhere is replaced before the softmax.
    empty = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & ~empty, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    if dropout_p > 0.0:
        keep = dropout_keep_mask(seed, dropout_p, B, H, T, S, device=q.device, first_batch=first_batch)
        weights = weights * keep / (1.0 - dropout_p)
    out = weights.to(v.dtype) @ v
    if not return_lse:
        return out
    lse = scores.detach().masked_fill(empty, float("-inf")).logsumexp(-1)
    return out, lse if lse.dtype == torch.float64 else lse.float()


def attention_weights(q, k, lse, *, queries=(None, None), causal=True, scale=None, key_mask=None, window=None):
    """q (B, H, T, D), k (B, G, S, D), lse (B, H, T) -> (B, heads, rows, S). See `fastgpt.ops.attention_weights`."""
    heads, rows = (slice(None) if chosen is None else chosen for chosen in queries)
    (H, T, D), (G, S) = q.shape[1:], k.shape[1:3]
    k = k.repeat_interleave(H // G, dim=1)[:, heads]
    scores = (q[:, heads][:, :, rows] @ k.transpose(-2, -1)) * (D ** -0.5 if scale is None else scale)
    # A row that sees no key has weights 0, not e**(-inf + inf)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))[:, heads][:, :, rows, None]
    visible = attention_mask(T, S, causal, key_mask, q.device, window)[:, :, rows]
    return (scores - lse).exp().masked_fill(~visible, 0.0).to(q.dtype)


def packed_attention(q, k, v, q_starts, k_starts, *, causal=True, scale=None, dropout_p=0.0, seed=0, window=None):
    """q (N, H, D), k and v (M, G, D), starts (B + 1,) -> (N, H, D). See `fastgpt.ops.packed_attention`."""
    out = [q[:0]]
    q_starts, k_starts = q_starts.tolist(), k_starts.tolist()
    for b, rows in enumerate(map(slice, q_starts, q_starts[1:])):
        keys = slice(k_starts[b], k_starts[b + 1])
        heads = (x[part].transpose(0, 1)[None] for x, part in ((q, rows), (k, keys), (v, keys)))  # (1, H or G, rows, D)
        out.append(attention(*heads, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed, window=window,
                             first_batch=b)[0].transpose(0, 1))
    return torch.cat(out)


def attention_mask(T, S, causal=True, key_mask=None, device=None, window=None):
    """Which keys a query may see, bool (B or 1, 1, T, S). Causal masks are aligned at the last query and the last key;
    of the keys that one leaves, a window leaves the last."""
    visible = torch.ones(1, 1, T, S, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril(S - T)
    if window is not None:
        visible = visible.triu(S - T - window + 1)
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def store_kv(cache, k, v, block_tables, query_lens, context_lens):
    """k and v (N, G, D): the new tokens of all sequences one after another. See `fastgpt.ops.store_kv`."""
    row = 0
    for table, new, length in zip(block_tables, query_lens.tolist(), context_lens.tolist()):
        for position in range(length - new, length):
            page, at = int(table[position // cache.page_size]), position % cache.page_size
            lanes = cache.k.shape[-1]
            _store_row(cache.k[page, :, at // lanes, :, at % lanes], k[row], cache.k_scale, (page, slice(None), at))
            _store_row(cache.v[page, :, at], v[row], cache.v_scale, (page, slice(None), at))
            row += 1


def _store_row(to, row, scales, at):
    """row (G, D) into a view of a cache; of int8 and float8 rounded after a division by a scale for each of the G."""
    if scales is not None:
        scale = row.float().abs().amax(-1) / paged.LARGEST[to.dtype]
        scales[at] = scale
        row = row.float() / scale.where(scale > 0, 1)[:, None]
        row = row.round() if to.dtype == torch.int8 else row
    to.copy_(row)


def paged_attention(q, cache, block_tables, query_lens, context_lens, *, scale=None, window=None):
    """q (N, H, D) -> (N, H, D). See `fastgpt.ops.paged_attention`."""
    out, row = [], 0
    for table, new, length in zip(block_tables, query_lens.tolist(), context_lens.tolist()):
        k, v = (cache.rows(name, table, length).to(q.dtype)[None] for name in "kv")
        queries = q[row:row + new].transpose(0, 1)[None]  # (1, H, new, D)
        out.append(attention(queries, k, v, scale=scale, window=window)[0].transpose(0, 1))
        row += new
    return torch.cat(out) if out else torch.empty_like(q)


def cross_entropy(x, weight, targets, *, bias=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
                  z_loss=0.0):
    logits = F.linear(x, weight, bias).reshape(targets.numel(), len(weight))  # (N, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction,
                           label_smoothing=label_smoothing)
    if z_loss:
        counts = targets.flatten() != ignore_index
        squares = z_loss * logits.logsumexp(-1).square() * counts
        loss = loss + (squares if reduction == "none" else squares.sum() / (counts.sum() if reduction == "mean" else 1))
    return loss.view(targets.shape) if reduction == "none" else loss


def mix32(x):
    """A bijective hash of 32-bit integers held in int64 (the 'lowbias32' multipliers): what the dropout mask is made of."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def dropout_threshold(dropout_p):
    """The hashes below this (of 2**32) are dropped."""
    return min(int(dropout_p * 2.0 ** 32), 2 ** 32 - 1)


def dropout_keep_mask(seed, dropout_p, B, H, T, S, device=None, first_batch=0):
    """The keep-mask (B, H, T, S) of attention dropout, and with B = H = 1 that of other matrices (T, S): a pure function of (seed, b, h, i, j), equal on every device.

    seed: an int, or a tensor () of int64 as a compiled graph holds it.

    A row's key absorbs seed (low word, high word), b, h and i in turn; key j is kept when hash(row key + j * golden
    ratio) reaches the threshold. So a tile of any shape can make its own part of the mask.
    """
    def index(n, dim):
        return torch.arange(n, device=device).view([-1 if d == dim else 1 for d in range(4)])

    key = torch.full((1, 1, 1, 1), _GOLDEN, dtype=torch.int64, device=device)
    for word in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, index(B, 0) + first_batch, index(H, 1), index(T, 2)):
        key = mix32(key ^ word)
    return mix32((key + index(S, 3) * _GOLDEN) & 0xFFFFFFFF) >= dropout_threshold(dropout_p)
