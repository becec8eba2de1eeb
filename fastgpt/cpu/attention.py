"""Attention: launchers of csrc/cpu/attention.inl, attention_backward.inl and attention_weights.inl."""
from fastgpt.autograd.attention import (
    define_attention,
    define_attention_weights,
    define_packed_attention,
    empty_joinable,
    empty_lse,
    empty_weights,
)
from fastgpt.autograd.tensors import dense
from fastgpt.cpu.launch import DTYPES, pointer
from fastgpt.extension import _C


def _heads(x):
    """A (B, heads, length, D) tensor as the kernels take it: address and strides."""
    batch, head, position, _ = x.stride()
    return x.data_ptr(), batch, head, position


def unit_stride(*tensors):
    """Tensors whose last dimension is contiguous: what the kernels need of a row."""
    return tuple(t if t.stride(3) == 1 else t.contiguous() for t in tensors)


def _shape(q, k):
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    return B, H, G, T, S, D


def _options(causal, scale, dropout_p, seed):
    return causal, scale, dropout_p, 0 if seed is None else int(seed)


def _forward(q, k, v, key_mask, seed, causal, scale, dropout_p, window, keep_lse):
    q, k, v = unit_stride(q, k, v)
    key_mask, = dense(key_mask)
    out, lse = empty_joinable(q), empty_lse(q, keep_lse)
    _C.attention_forward(DTYPES[q.dtype], _heads(q), _heads(k), _heads(v), pointer(key_mask), _shape(q, k),
                         _options(causal, scale, dropout_p, seed), _heads(out), pointer(lse))
    return out, lse


def _backward(dout, q, k, v, out, lse, key_mask, seed, causal, scale, dropout_p, window):
    dout, q, k, v, out = unit_stride(dout, q, k, v, out)
    key_mask, lse = dense(key_mask, lse)
    dq, dk, dv = empty_joinable(q), empty_joinable(k), empty_joinable(v)
    _C.attention_backward(DTYPES[q.dtype], _heads(dout), _heads(q), _heads(k), _heads(v), _heads(out), pointer(lse),
                          pointer(key_mask), _shape(q, k), _options(causal, scale, dropout_p, seed), _heads(dq),
                          _heads(dk), _heads(dv))
    return dq, dk, dv


def _packed_forward(q, k, v, key_mask, seed, causal, scale, dropout_p, window, keep_lse, packing):
    """One call for each sequence: threads share its heads and queries."""
    out, lse = empty_joinable(q), empty_lse(q, keep_lse)
    for rows, keys in _sequences(packing):
        part = _forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], None, seed, causal, scale, dropout_p, window, keep_lse)
        out[:, :, rows] = part[0]
        if keep_lse:
            lse[:, :, rows] = part[1]
    return out, lse


def _packed_backward(dout, q, k, v, out, lse, key_mask, seed, causal, scale, dropout_p, window, packing):
    dq, dk, dv = empty_joinable(q), empty_joinable(k), empty_joinable(v)
    for rows, keys in _sequences(packing):
        queries = (x[:, :, rows] for x in (dout, q))
        dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = _backward(
            *queries, k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows], None, seed, causal, scale, dropout_p,
            window)
    return dq, dk, dv


def _sequences(packing):
    """Of each: its queries' rows, its keys' rows, as slices."""
    return zip(*(map(slice, starts, starts[1:]) for starts in (packing[0].tolist(), packing[1].tolist())))


def _weights(q, k, lse, heads, rows, key_mask, causal, scale, window):
    q, k = unit_stride(q, k)
    lse, heads, rows, key_mask = dense(lse, heads, rows, key_mask)
    weights = empty_weights(q, k, heads, rows)
    _C.attention_weights(DTYPES[q.dtype], _heads(q), _heads(k), pointer(lse), pointer(key_mask),
                         (pointer(heads), len(heads), pointer(rows), len(rows)), _shape(q, k),
                         _options(causal, scale, 0.0, None), window, pointer(weights))
    return weights


attention = define_attention("", _forward, _backward)
attention_weights = define_attention_weights("", _weights)
packed_attention = define_packed_attention("", _packed_forward, _packed_backward)
