"""GELU, alone and behind a bias: launchers of csrc/cpu/gelu.inl."""
import torch

from fastgpt.autograd.gelu import define_gelu
from fastgpt.autograd.tensors import dense, rows_of
from fastgpt.cpu.launch import DTYPES, pointer
from fastgpt.extension import _C
from fastgpt.memory import empty_like


def _shape(x, by_column):
    """(rows, columns) as the kernels see x: one row when nothing gives the columns a meaning."""
    return rows_of(x) if by_column else (1, x.numel())


def _forward(x, bias, tanh):
    x, bias = dense(x, bias)
    y = empty_like(x)
    _C.gelu_forward(DTYPES[x.dtype], tanh, pointer(x), pointer(bias), pointer(y), *_shape(x, bias is not None))
    return y


def _backward(dy, x, bias, tanh, wants_dbias):
    dy, x, bias = dense(dy, x, bias)
    dx = empty_like(x)
    dbias = torch.empty(x.shape[-1] if wants_dbias else 0, dtype=torch.float32, device=x.device)
    _C.gelu_backward(DTYPES[x.dtype], tanh, pointer(dy), pointer(x), pointer(bias), pointer(dx),
                     pointer(dbias) if wants_dbias else 0, *_shape(x, bias is not None or wants_dbias))
    return dx, dbias.to(x.dtype)


gelu, bias_gelu = define_gelu("", _forward, _backward)
