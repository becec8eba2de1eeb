"""The matrix product of csrc/cpu/gemm.inl on strided matrices: the launcher that linear and the fused head share."""
from fastgpt.cpu.launch import DTYPES, pointer
from fastgpt.extension import _C, ACTIVATIONS
from fastgpt.memory import empty


def matmul(a, b, out=None, *, accumulate=False, bias=None, activation=None, pre=None, residual=None):
    """activation(a @ b + bias) + residual: a (M, K) and b (K, N) of any strides and dtypes, sums in float32.

    out (M, N), by default new in a's dtype, its columns contiguous; accumulate adds to what a float32 out holds.
    bias (N,); pre (receives the product + bias) and residual have out's dtype and strides.
    """
    if out is None:
        out = empty((a.shape[0], b.shape[1]), a.dtype)
    epilogue = (0 if bias is None else DTYPES[bias.dtype], pointer(bias), ACTIVATIONS[activation], pointer(pre),
                pointer(residual))
    _C.gemm(_matrix(a), _matrix(b), _matrix(out), accumulate, epilogue)
    return out


def _matrix(tensor):
    (rows, columns), (row, column) = tensor.shape, tensor.stride()
    return DTYPES[tensor.dtype], tensor.data_ptr(), rows, columns, row, column
