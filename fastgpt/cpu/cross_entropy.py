"""The head and its loss: launchers of csrc/cpu/cross_entropy.inl."""
import torch

from fastgpt.autograd.cross_entropy import Launchers, Products, define_cross_entropy
from fastgpt.autograd.tensors import dense
from fastgpt.cpu.gemm import matmul
from fastgpt.cpu.launch import DTYPES, pointer
from fastgpt.cpu.linear import bfloat16_product
from fastgpt.extension import _C
from fastgpt.torch_op import is_traced


def _torch_product(a, b, out, *, accumulate=False, bias=None):
    if accumulate:
        out += torch.mm(a, b)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
    return out


# Logits and sums in float32, whatever the dtype of x and weight. 256 rows with V = 50257: 128 take 4 % more time, 512 no
# less.
OUR_PRODUCTS = Products(torch.float32, 52e6, matmul)
# bfloat16 where the processor multiplies it; logits in bfloat16 as well, as a linear layer of PyTorch has them. 1024 rows
# with V = 50257: a dweight in chunks costs four passes over memory for each.
TORCH_PRODUCTS = Products(torch.bfloat16, 104e6, _torch_product)


def _products(dtype):
    return TORCH_PRODUCTS if dtype == torch.bfloat16 and bfloat16_product()[0] == "torch" else OUR_PRODUCTS


def _count(targets, V, ignore_index):
    """How many targets are not ignored; raises where one is no id."""
    (targets,), result = dense(targets), torch.empty(2, dtype=torch.int64)
    _C.check_targets(pointer(targets), targets.numel(), V, ignore_index, pointer(result))
    count, wrong = result.tolist()
    if wrong >= 0:
        position = [int(i) for i in torch.unravel_index(torch.tensor(wrong), targets.shape)]
        raise IndexError(f"cross_entropy: targets{position} is {targets.flatten()[wrong]}, expected an id in [0, {V}) or "
                         f"ignore_index = {ignore_index}")
    return count


def _losses(logits, V, targets, scale, out, options):
    targets, scale = dense(targets, scale)
    _C.cross_entropy(DTYPES[logits.dtype], pointer(logits), pointer(targets), pointer(scale),
                     scale is not None and len(scale) > 1, pointer(out), len(logits), V, options)


def _add_rows(x, sums):
    _C.add_rows(DTYPES[x.dtype], pointer(x), pointer(sums), *x.shape)


def _multiply_gradient(gradient, dloss):
    as_saved = not is_traced(dloss) and dloss.item() == 1
    return gradient if as_saved else gradient * dloss.to(gradient.dtype)


cross_entropy = define_cross_entropy("", Launchers(_products, lambda V: V, _count, _losses, _add_rows,
                                                   _multiply_gradient))
