"""The heads of attention as views of the product that makes them; their gradients join in memory from the pool."""
import torch

from fastgpt import memory
from fastgpt.torch_op import is_traced, needs_gradient


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head):
        ctx.n_head = n_head
        return _views(qkv, n_head)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        B, H, T, D = gradients[0].shape
        joined = memory.empty((B, T, 3 * H * D), gradients[0].dtype, gradients[0].device)
        for part, gradient in zip(_views(joined, H), gradients):
            part.copy_(gradient)
        return joined, None


def split_heads(qkv, n_head):
    """(B, T, 3 C) -> q, k and v, each (B, H, T, D)."""
    traced = torch.compiler.is_compiling() or is_traced(qkv)
    if memory.from_pool(qkv.shape, qkv.dtype, qkv.device) and needs_gradient(qkv) and not traced:
        return _SplitHeads.apply(qkv, n_head)
    return _views(qkv, n_head)


def _views(qkv, n_head):
    B, T, C = qkv.shape
    return tuple(part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.split(C // 3, dim=2))
