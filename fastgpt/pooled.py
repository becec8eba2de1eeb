"""PyTorch's own operations, with results or gradients in the pool of `fastgpt.memory` where there is one.

They stand between ops, and would take memory from malloc, whose holes the pool is there to avoid.
"""
import torch
import torch.nn.functional as F

from fastgpt import memory
from fastgpt.torch_op import is_traced, needs_gradient


def _in_pool(x, shape, dtype):
    """Whether something of that shape and dtype beside x would lie there."""
    return not (torch.compiler.is_compiling() or is_traced(x)) and memory.from_pool(shape, dtype, x.device)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        ids, = ctx.saved_tensors
        dweight = memory.untouched_zeros(ctx.shape, ctx.dtype)
        return None, dweight.index_add_(0, ids.flatten(), dy.reshape(-1, ctx.shape[1]))


def embedding(ids, weight):
    """ids (...) and weight (V, C) -> the rows (..., C). The gradient takes memory for the rows alone that are not zero."""
    if _in_pool(weight, weight.shape, weight.dtype) and needs_gradient(weight) and not is_traced(ids):
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head):
        ctx.n_head = n_head
        return _heads(qkv, n_head)

    @staticmethod
    def backward(ctx, *gradients):
        B, H, T, D = gradients[0].shape
        joined = memory.empty((B, T, 3 * H * D), gradients[0].dtype, gradients[0].device)
        for part, gradient in zip(_heads(joined, H), gradients):
            part.copy_(gradient)
        return joined, None


def split_heads(qkv, n_head):
    """(B, T, 3 C) -> q, k and v, each (B, H, T, D), as views."""
    if _in_pool(qkv, qkv.shape, qkv.dtype) and needs_gradient(qkv):
        return _SplitHeads.apply(qkv, n_head)
    return _heads(qkv, n_head)


def _heads(qkv, n_head):
    B, T, C = qkv.shape
    return tuple(part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.split(C // 3, dim=2))


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return memory.empty(x.shape, dtype).copy_(x)

    @staticmethod
    def backward(ctx, dy):
        return memory.empty(dy.shape, ctx.dtype).copy_(dy), None


def cast(x, dtype):
    """x.to(dtype)"""
    return _Cast.apply(x, dtype) if x.dtype != dtype and _in_pool(x, x.shape, dtype) else x.to(dtype)


def autocast(*tensors):
    """The matrices of a product in autocast's dtype, when it is on for their device."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else cast(t, dtype) for t in tensors)
