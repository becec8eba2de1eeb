"""The lookup of embeddings, whose gradient has few rows that are not zero, and takes memory for these alone."""
import torch
import torch.nn.functional as F

from fastgpt import memory
from fastgpt.torch_op import is_traced, needs_gradient


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        ids, = ctx.saved_tensors
        dweight = memory.untouched_zeros(ctx.shape, ctx.dtype)
        return None, dweight.index_add_(0, ids.flatten(), dy.flatten(0, -2))


def embedding(ids, weight):
    """ids (...) and weight (V, C) -> the rows (..., C)."""
    if memory.from_pool(weight.shape, weight.dtype, weight.device) and needs_gradient(weight) and not (
            torch.compiler.is_compiling() or is_traced(ids) or is_traced(weight)):
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)
