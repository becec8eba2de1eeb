"""Attention: launchers of csrc/cpu/attention.inl and attention_backward.inl, and their PyTorch ops."""
import torch

from fastgpt.extension import _C
from fastgpt.cpu.launch import DTYPES, dense, pointer
from fastgpt.torch_op import define, needs_gradient


def _heads(x):
    """A (B, heads, length, D) tensor as the kernels take it: address and strides."""
    batch, head, position, _ = x.stride()
    return x.data_ptr(), batch, head, position


def _unit_stride(*tensors):
    """Tensors whose last dimension is contiguous: what the kernels need of a row."""
    return tuple(t if t.stride(3) == 1 else t.contiguous() for t in tensors)


def _shape(q, k):
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    return B, H, G, T, S, D


def _options(causal, scale, dropout_p, seed):
    return causal, scale, dropout_p, 0 if seed is None else int(seed)


def _empty_joinable(x):
    """An uninitialised tensor of x's shape (B, H, T, D) that lies as (B, T, H, D): its heads join without a copy."""
    _, H, T, D = x.shape
    return torch.empty_strided(x.shape, (T * H * D, D, H * D, 1), dtype=x.dtype, device=x.device)


def _empty_lse(q, keep_lse):
    return torch.empty(q.shape[:3] if keep_lse else (0,), dtype=torch.float32, device=q.device)


def _forward(q, k, v, key_mask, seed, causal, scale, dropout_p, keep_lse):
    q, k, v = _unit_stride(q, k, v)
    key_mask, = dense(key_mask)
    out, lse = _empty_joinable(q), _empty_lse(q, keep_lse)
    _C.attention_forward(DTYPES[q.dtype], _heads(q), _heads(k), _heads(v), pointer(key_mask), _shape(q, k),
                         _options(causal, scale, dropout_p, seed), _heads(out), pointer(lse))
    return out, lse


def _backward(dout, q, k, v, out, lse, key_mask, seed, causal, scale, dropout_p):
    dout, q, k, v, out = _unit_stride(dout, q, k, v, out)
    key_mask, lse = dense(key_mask, lse)
    dq, dk, dv = _empty_joinable(q), _empty_joinable(k), _empty_joinable(v)
    _C.attention_backward(DTYPES[q.dtype], _heads(dout), _heads(q), _heads(k), _heads(v), _heads(out), pointer(lse),
                          pointer(key_mask), _shape(q, k), _options(causal, scale, dropout_p, seed), _heads(dq),
                          _heads(dk), _heads(dv))
    return dq, dk, dv


def _fake_forward(q, k, v, key_mask, seed, causal, scale, dropout_p, keep_lse):
    return _empty_joinable(q), _empty_lse(q, keep_lse)


def _fake_backward(dout, q, k, v, out, lse, key_mask, seed, causal, scale, dropout_p):
    return _empty_joinable(q), _empty_joinable(k), _empty_joinable(v)


def _setup(ctx, inputs, output):
    q, k, v, key_mask, seed, *ctx.options, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, key_mask, seed)


def _grad(ctx, dout, _):
    dq, dk, dv = (None,) * 3 if dout is None else _attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, None, None, None, None, None


_attention_backward = define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask,"
    " Tensor? seed, bool causal, float scale, float dropout_p) -> (Tensor, Tensor, Tensor)", _backward, _fake_backward)
_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? seed, bool causal, float scale, float dropout_p,"
    " bool keep_lse) -> (Tensor, Tensor)", _forward, _fake_forward, setup_context=_setup, backward=_grad)


def attention(q, k, v, *, causal=True, scale=None, dropout_p=0.0, key_mask=None, seed=0):
    """seed: an int, or a tensor () of int64 as a compiled graph holds it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not dropout_p:
        seed = None
    elif isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64, device="cpu")
    return _attention(q, k, v, key_mask, seed, causal, scale, dropout_p, needs_gradient(q, k, v))[0]
