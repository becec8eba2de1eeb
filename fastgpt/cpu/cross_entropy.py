"""A language model's head and its loss in one op, for a chunk of rows at a time.

The chunk's logits become their own gradient in place (csrc/cpu/cross_entropy.inl) and go at once into the products for
dx and dweight, so that backward has nothing left to do but multiply by the gradient that comes in, mostly 1. Only where
each row has a gradient of its own (reduction="none") does backward compute the chunks again.
"""
import torch

from fastgpt.extension import _C
from fastgpt.cpu.gemm import matmul
from fastgpt.cpu.launch import DTYPES, dense, pointer
from fastgpt.cpu.linear import bfloat16_product
from fastgpt.torch_op import _is_traced, define

MIN_ROWS = 64
NOTHING = [False, False, False]


class _OurProducts:
    """Logits and sums in float32, whatever the dtype of x and weight."""
    logits_dtype = torch.float32
    chunk_bytes = 52e6  # of logits: 256 rows with V = 50257; 128 take 4 % more time, 512 no less
    multiply = staticmethod(matmul)


class _TorchProducts:
    """bfloat16 where the processor multiplies it; logits in bfloat16 as well, as a linear layer of PyTorch has them."""
    logits_dtype = torch.bfloat16
    chunk_bytes = 104e6  # 1024 rows with V = 50257: a dweight in chunks costs four passes over memory for each

    @staticmethod
    def multiply(a, b, out, *, accumulate=False, bias=None):
        if accumulate:
            out += torch.mm(a, b)
        elif bias is not None:
            torch.addmm(bias, a, b, out=out)
        elif out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            out.copy_(torch.mm(a, b))
        return out


def _products(dtype):
    return _TorchProducts if dtype == torch.bfloat16 and bfloat16_product()[0] == "torch" else _OurProducts


class _Gradients:
    """Room for what is wanted of dx (N, K), dweight (V, K) and dbias (V,); the rest has no elements."""

    def __init__(self, x, weight, wanted, chunks):
        self.wanted, self.multiply = wanted, _products(x.dtype).multiply
        self.dx = torch.empty(x.shape if wanted[0] else 0, dtype=x.dtype)
        self.dweight = torch.empty(weight.shape if wanted[1] else 0, dtype=x.dtype if chunks == 1 else torch.float32)
        self.dbias = torch.zeros(len(weight) if wanted[2] else 0, dtype=torch.float32)
        if chunks == 0:
            self.dweight.zero_()

    def add(self, dlogits, x, weight, begin):
        """Of a chunk: x holds its rows, from row `begin` on."""
        if self.wanted[0]:
            self.multiply(dlogits, weight, out=self.dx[begin:begin + len(x)])
        if self.wanted[1]:
            self.multiply(dlogits.t(), x, out=self.dweight, accumulate=begin > 0)
        if self.wanted[2]:
            _C.add_rows(DTYPES[dlogits.dtype], pointer(dlogits), pointer(self.dbias), *dlogits.shape)

    def of_dtype(self, dtype):
        return self.dx, self.dweight.to(dtype), self.dbias.to(dtype)


def _in_chunks(x, weight, bias, targets, ignore_index, scales, wanted):
    """scales (N,): the gradient of each row's loss, or None -> losses (N,), their sum in float64, gradients."""
    bias, targets, scales = dense(bias, targets, scales)
    N, V = len(x), len(weight)
    products = _products(x.dtype)
    chunks, rows = _split(N, int(products.chunk_bytes / (max(V, 1) * products.logits_dtype.itemsize)))
    losses, total = torch.empty(N, dtype=torch.float32), torch.zeros((), dtype=torch.float64)
    gradients = _Gradients(x, weight, wanted, chunks)
    buffer = torch.empty((rows, V), dtype=products.logits_dtype)
    for begin in range(0, N, rows or 1):
        chunk = x[begin:begin + rows]
        logits = products.multiply(chunk, weight.t(), out=buffer[:len(chunk)], bias=bias)
        _C.cross_entropy(DTYPES[logits.dtype], pointer(logits), pointer(targets) + 8 * begin, ignore_index,
                         0 if scales is None else pointer(scales) + 4 * begin, pointer(losses) + 4 * begin,
                         pointer(total), len(chunk), V)
        if scales is not None:
            gradients.add(logits, chunk, weight, begin)
    return losses, total, gradients.of_dtype(x.dtype)


def _split(N, most):
    """N rows in chunks of nearly one size, of at most `most` rows: (chunks, rows in each but the last)."""
    chunks = -(-N // max(MIN_ROWS, most))
    return chunks, -(-N // chunks) if chunks else 0


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


def _forward(x, weight, bias, targets, ignore_index, mean, wanted):
    """-> the mean or summed loss, its gradients."""
    count = _count(targets, len(weight), ignore_index)
    scale = 1 / max(count, 1) if mean else 1.0
    scales = torch.full((len(x),), scale, dtype=torch.float32) if any(wanted) else None
    _, total, gradients = _in_chunks(x, weight, bias, targets, ignore_index, scales, wanted)
    return (total / count if mean else total).float(), *gradients


def _rows_forward(x, weight, bias, targets, ignore_index):
    _count(targets, len(weight), ignore_index)
    return _in_chunks(x, weight, bias, targets, ignore_index, None, NOTHING)[0].view(targets.shape)


def _rows_backward(dlosses, x, weight, bias, targets, ignore_index, wanted):
    return _in_chunks(x, weight, bias, targets, ignore_index, dlosses, wanted)[2]


def _fake_gradients(x, weight, wanted):
    return tuple(x.new_empty(shape if want else 0)
                 for shape, want in zip((x.shape, weight.shape, weight.shape[:1]), wanted))


def _fake_forward(x, weight, bias, targets, ignore_index, mean, wanted):
    return x.new_empty((), dtype=torch.float32), *_fake_gradients(x, weight, wanted)


def _fake_rows_forward(x, weight, bias, targets, ignore_index):
    return x.new_empty(targets.shape, dtype=torch.float32)


def _fake_rows_backward(dlosses, x, weight, bias, targets, ignore_index, wanted):
    return _fake_gradients(x, weight, wanted)


def _setup(ctx, inputs, output):
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def _grad(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 7
    as_saved = not _is_traced(dloss) and dloss.item() == 1
    gradients = (g if as_saved else g * dloss.to(g.dtype) for g in ctx.saved_tensors)
    return *(g if want else None for g, want in zip(gradients, ctx.needs_input_grad)), None, None, None, None


def _rows_setup(ctx, inputs, output):
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _rows_grad(ctx, dlosses):
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _cross_entropy_rows_backward(dlosses, *ctx.saved_tensors, ctx.ignore_index, wanted)
    return *(g if want else None for g, want in zip(gradients, wanted)), None, None


_cross_entropy_rows_backward = define(
    "cross_entropy_rows_backward(Tensor dlosses, Tensor x, Tensor weight, Tensor? bias, Tensor targets,"
    " int ignore_index, bool[] wanted) -> (Tensor, Tensor, Tensor)", _rows_backward, _fake_rows_backward)
_cross_entropy_rows = define(
    "cross_entropy_rows(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index) -> Tensor",
    _rows_forward, _fake_rows_forward, setup_context=_rows_setup, backward=_rows_grad)
_cross_entropy = define(
    "cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, bool mean, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)", _forward, _fake_forward, setup_context=_setup, backward=_grad)


def cross_entropy(x, weight, targets, *, bias=None, ignore_index=-100, reduction="mean"):
    x = x.reshape(targets.numel(), x.shape[-1])
    if bias is not None:
        bias = bias.to(x.dtype)
    if reduction == "none":
        return _cross_entropy_rows(x, weight, bias, targets, ignore_index)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    return _cross_entropy(x, weight, bias, targets, ignore_index, reduction == "mean", wanted)[0]
