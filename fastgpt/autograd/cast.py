"""A cast between dtypes whose result, and whose gradient, lie in the pool with those of the ops around it."""
import torch

from fastgpt import memory
from fastgpt.torch_op import is_traced


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return memory.empty(x.shape, dtype).copy_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return memory.empty(dy.shape, ctx.dtype).copy_(dy), None


def cast(x, dtype):
    """x.to(dtype)"""
    traced = torch.compiler.is_compiling() or is_traced(x)
    if traced or x.dtype == dtype or not memory.from_pool(x.shape, dtype, x.device):
        return x.to(dtype)
    return _Cast.apply(x, dtype)


def autocast(*tensors):
    """The matrices of a product in autocast's dtype, when it is on for their device."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else cast(t, dtype) for t in tensors)
