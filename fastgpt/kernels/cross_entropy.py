"""A language model's head and its loss for NVIDIA GPUs: the logits of a chunk of rows at a time, never all of them
(Liger Kernel, Hsu et al. 2024, arXiv:2410.10989; Wijmans et al. 2024, arXiv:2411.09009).

The products are cuBLAS's. Between them this kernel reads a row of logits twice and writes its gradient in their place; the
rows of logits lie at multiples of 128 bytes, whatever the vocabulary, so that every access is 16 bytes wide.

BYTES counts the row's second reading, though the L2 cache may still hold it.
"""
import torch
import triton
import triton.language as tl

from fastgpt.autograd.cross_entropy import Launchers, Products, define_cross_entropy
from fastgpt.kernels.launch import launch
from fastgpt.kernels.spec import Spec
from fastgpt.kernels.tuning import CROSS_ENTROPY_BLOCK, CROSS_ENTROPY_CHUNK, CROSS_ENTROPY_WARPS

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(LOGITS, TARGETS, SCALE, LOSSES, ignore_index, smoothing, z_loss, V: tl.constexpr,
                         STRIDE: tl.constexpr, HAS_GRADIENT: tl.constexpr, SCALE_OF_ROW: tl.constexpr,
                         SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes one row of LOGITS (rows, STRIDE), of which V columns count.

    LOSSES: (1 - smoothing) * the cross entropy + smoothing * its mean over all classes + z_loss * lse**2. With HAS_GRADIENT
    the row becomes SCALE * the loss's gradient. A target outside [0, V) makes it and the loss NaN.
    """
    row = tl.program_id(0)
    target = tl.load(TARGETS + row)
    logits = LOGITS + row.to(tl.int64) * STRIDE
    columns = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(LOSSES + row, 0.0)
        if HAS_GRADIENT:
            for start in range(0, V, BLOCK):
                nothing = tl.zeros([BLOCK], LOGITS.dtype.element_ty)
                tl.store(logits + start + columns, nothing, mask=start + columns < STRIDE)
        return
    known = (target >= 0) & (target < V)
    at_target = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    logit_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        # Up to STRIDE, so that an access is as wide as it can be: no such mask ends within 16 bytes
        x = tl.load(logits + start + columns, mask=start + columns < STRIDE, other=0.0).to(tl.float32)
        inside = start + columns < V
        x = tl.where(inside, x, float("-inf"))
        if SMOOTHING:
            logit_sum += tl.where(inside, x, 0.0)
        new_top = tl.maximum(top, x)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight_sum = weight_sum * tl.exp2((top - base) * LOG2E) + tl.exp2((x - base) * LOG2E)
        top = new_top
    most = tl.max(top, 0)
    weight_sum = tl.sum(weight_sum * tl.exp2((top - most) * LOG2E), 0)
    log_sum = tl.log2(weight_sum) * 0.6931471805599453
    lse = most + log_sum
    loss = log_sum - (at_target - most)
    if SMOOTHING:
        loss += smoothing * (at_target - tl.sum(logit_sum, 0) / V)
    if Z_LOSS:
        loss += z_loss * lse * lse
    tl.store(LOSSES + row, loss)
    if HAS_GRADIENT:
        scale = tl.load(SCALE + row) if SCALE_OF_ROW else tl.load(SCALE)
        scale = tl.where(known, scale, float("nan"))
        factor = (scale * (1 + 2 * z_loss * lse) if Z_LOSS else scale) / weight_sum
        others = scale * smoothing / V if SMOOTHING else 0.0
        chosen = scale * (1 - smoothing) if SMOOTHING else scale
        for start in range(0, V, BLOCK):
            exists = start + columns < STRIDE
            x = tl.load(logits + start + columns, mask=exists, other=0.0).to(tl.float32)
            gradient = factor * tl.exp2((x - most) * LOG2E)
            if SMOOTHING:
                gradient -= others
            gradient = tl.where(start + columns == target, gradient - chosen, gradient)
            tl.store(logits + start + columns, gradient.to(LOGITS.dtype.element_ty), mask=exists)


def _losses(logits, V, targets, scale, out, options):
    rows, stride = logits.shape
    launch(cross_entropy_kernel, rows, (logits, targets.contiguous(), scale, out, *options),
           {"V": V, "STRIDE": stride, "HAS_GRADIENT": scale is not None,
            "SCALE_OF_ROW": scale is not None and len(scale) > 1, "SMOOTHING": options[1] > 0, "Z_LOSS": options[2] > 0,
            "BLOCK": min(CROSS_ENTROPY_BLOCK, triton.next_power_of_2(stride))}, num_warps=CROSS_ENTROPY_WARPS)


def _multiply(a, b, out, *, accumulate=False, bias=None):
    if accumulate:
        _accumulate(a, b, out)
    elif out.dtype != a.dtype:
        _accumulate(a, b, out.zero_())
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
    return out


# cuBLAS adds 16-bit products to a float32 sum as it goes, which PyTorch has offered since 2.10.
ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def _accumulate(a, b, out):
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda and ADDS_TO_FLOAT32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b)


def _row_stride(V):
    """A multiple of 64: 128 bytes of a 16-bit dtype."""
    return triton.cdiv(V, 64) * 64


def _multiply_gradient(gradient, dloss):
    """In float32 and rounded once. dloss has a dimension, or PyTorch would round it to the gradient's dtype first: a gradient
    scaler's 65536 is infinite in float16."""
    return torch.mul(gradient, dloss.float().view(1), out=torch.empty_like(gradient))


cross_entropy = define_cross_entropy("triton_", Launchers(
    products=lambda dtype: Products(dtype, CROSS_ENTROPY_CHUNK, _multiply), row_stride=_row_stride,
    count=lambda targets, V, ignore_index: (targets != ignore_index).sum(), losses=_losses,
    add_rows=lambda x, sums: sums.add_(x.sum(0, dtype=torch.float32)),
    multiply_gradient=_multiply_gradient))

BYTES = {"cross_entropy_kernel": "(1 + 2 * HAS_GRADIENT) * rows * V * e"}


def _inputs(dtype, device, gpt2):
    N, K, V = (8192, 768, 50257) if gpt2 else (70, 24, 1003)
    targets = torch.randint(V, (N,), device=device)
    targets[::9] = -100
    return {"x": torch.randn(N, K, dtype=dtype, device=device), "weight": torch.randn(V, K, dtype=dtype, device=device)}, {
        "targets": targets}


SPECS = [
    Spec("cross_entropy", "cross_entropy", _inputs),
    Spec("cross_entropy, smoothed", "cross_entropy", _inputs, {"label_smoothing": 0.1, "z_loss": 1e-3}),
    Spec("cross_entropy of rows", "cross_entropy", _inputs, {"reduction": "none"}),
]
