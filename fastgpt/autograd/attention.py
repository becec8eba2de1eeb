"""Attention: its PyTorch op around a device's forward and backward launchers."""
import torch

from fastgpt.memory import empty
from fastgpt.torch_op import define, needs_gradient, seed_tensor


def empty_joinable(x):
    """An uninitialised tensor of x's shape (B, H, T, D) that lies as (B, T, H, D): its heads join without a copy."""
    return empty(x.shape, x.dtype, x.device, stride=_joinable(x))


def _joinable(x):
    _, H, T, D = x.shape
    return T * H * D, D, H * D, 1


def _fake_joinable(x):
    return x.new_empty_strided(x.shape, _joinable(x))


def empty_lse(q, keep_lse):
    """Room for the natural logarithm of each row's sum of e**score: (B, H, T) float32, or no elements."""
    return torch.empty(q.shape[:3] if keep_lse else (0,), dtype=torch.float32, device=q.device)


def define_attention(prefix, launch, launch_backward):
    """-> attention(q, k, v, ...), with ops of torch.library named after `prefix`.

    launch(q, k, v, key_mask, seed, causal, scale, dropout_p, window, keep_lse) -> out, lse.
    launch_backward(dout, q, k, v, out, lse, key_mask, seed, causal, scale, dropout_p, window) -> dq, dk, dv.
    window: how many keys a query sees, its own included; 0 stands for all.
    """
    backward = define(
        f"{prefix}attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask,"
        " Tensor? seed, bool causal, float scale, float dropout_p, int window) -> (Tensor, Tensor, Tensor)",
        launch_backward, _fake_backward)

    def grad(ctx, dout, _):
        dq, dk, dv = (None,) * 3 if dout is None else backward(dout, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, None, None, None, None, None, None

    op = define(
        f"{prefix}attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? seed, bool causal, float scale,"
        " float dropout_p, int window, bool keep_lse) -> (Tensor, Tensor)", launch, _fake_forward, setup_context=_setup,
        backward=grad)

    def attention(q, k, v, *, causal=True, scale=None, dropout_p=0.0, key_mask=None, seed=0, window=None,
                  return_lse=False):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        keep_lse = return_lse or needs_gradient(q, k, v)
        out, lse = op(q, k, v, key_mask, seed_tensor(dropout_p, seed), causal, scale, dropout_p, window or 0, keep_lse)
        return (out, lse) if return_lse else out

    return attention


def define_packed_attention(prefix, launch, launch_backward):
    """-> packed_attention(q, k, v, q_starts, k_starts, ...), with ops of torch.library named after `prefix`.

    The launchers are those of `define_attention` with `packing` as one more argument, (q_starts, k_starts). They see the
    packed rows as one batch, and read the starts, so that a compiler need not.
    """
    def forward(q, k, v, q_starts, k_starts, seed, causal, scale, dropout_p, window, keep_lse):
        out, lse = launch(*_as_batch(q, k, v), None, seed, causal, scale, dropout_p, window, keep_lse,
                          (q_starts, k_starts))
        return _as_rows(out), lse

    def backward(dout, q, k, v, out, lse, q_starts, k_starts, seed, causal, scale, dropout_p, window):
        gradients = launch_backward(*_as_batch(dout, q, k, v, out), lse, None, seed, causal, scale, dropout_p, window,
                                    (q_starts, k_starts))
        return tuple(map(_as_rows, gradients))

    options = "Tensor q_starts, Tensor k_starts, Tensor? seed, bool causal, float scale, float dropout_p, int window"
    backward_op = define(
        f"{prefix}packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {options})"
        " -> (Tensor, Tensor, Tensor)", backward, _fake_packed_backward)

    def grad(ctx, dout, _):
        gradients = (None,) * 3 if dout is None else backward_op(dout, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None,) * 8

    op = define(f"{prefix}packed_attention(Tensor q, Tensor k, Tensor v, {options}, bool keep_lse) -> (Tensor, Tensor)",
                forward, _fake_packed_forward, setup_context=_packed_setup, backward=grad)

    def packed_attention(q, k, v, q_starts, k_starts, *, causal=True, scale=None, dropout_p=0.0, seed=0, window=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return op(q, k, v, q_starts, k_starts, seed_tensor(dropout_p, seed), causal, scale, dropout_p, window or 0,
                  needs_gradient(q, k, v))[0]

    return packed_attention


def define_attention_weights(prefix, launch):
    """-> attention_weights(q, k, lse, ...), with an op of torch.library named after `prefix`, without a gradient.

    launch(q, k, lse, heads, rows, key_mask, causal, scale, window) -> weights.
    """
    op = define(
        f"{prefix}attention_weights(Tensor q, Tensor k, Tensor lse, Tensor heads, Tensor rows, Tensor? key_mask, bool causal,"
        " float scale, int window) -> Tensor", launch, _fake_weights)

    def attention_weights(q, k, lse, *, queries, causal=True, scale=None, key_mask=None, window=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return op(q, k, lse, *queries, key_mask, causal, scale, window or 0)

    return attention_weights


def empty_weights(q, k, heads, rows):
    """Room for the weights of some heads and rows: (B, heads, rows, S)."""
    return torch.empty((q.shape[0], len(heads), len(rows), k.shape[2]), dtype=q.dtype, device=q.device)


def _as_batch(*packed):
    """(rows, heads, D) -> (1, heads, rows, D)"""
    return tuple(x.transpose(0, 1)[None] for x in packed)


def _as_rows(batch):
    return batch[0].transpose(0, 1)


def _fake_packed_forward(q, *others):
    *_, keep_lse = others
    return q.new_empty(q.shape), empty_lse(q.transpose(0, 1)[None], keep_lse)


def _fake_packed_backward(dout, q, k, v, *others):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _packed_setup(ctx, inputs, output):
    q, k, v, q_starts, k_starts, seed, *ctx.options, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, q_starts, k_starts, seed)


def _fake_forward(q, *others):
    *_, keep_lse = others
    return _fake_joinable(q), empty_lse(q, keep_lse)


def _fake_weights(q, k, lse, heads, rows, *others):
    return empty_weights(q, k, heads, rows)


def _fake_backward(dout, q, k, v, *others):
    return _fake_joinable(q), _fake_joinable(k), _fake_joinable(v)


def _setup(ctx, inputs, output):
    q, k, v, key_mask, seed, *ctx.options, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, key_mask, seed)
