"""Public rivals of the Triton kernels, compiled without a GPU and read by tests/gpusim's sass_model.

Attention: the algorithm of Triton's fused-attention tutorial, written anew from its description, on plain pointers to
contiguous (B, H, T, D), as for B = 8, H = 12, T = 1024. Layer norm, GEGLU, cross entropy: Liger-Kernel's own kernels,
with the arguments, block sizes and warps that its own launchers choose. Shapes are GPT-2's.
"""
import contextlib
import importlib
import importlib.metadata
import itertools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.append(str(Path(__file__).parents[1] / "tests" / "gpusim"))

from compiling import compile_kernel
from executors import specialise
from sass_model import describe

HEAD_WIDTHS = 64, 128
ROWS, HIDDEN, GEGLU_WIDTH, VOCABULARY = 8192, 768, 3072, 50257
PROCESSORS = {80: 108, 90: 132}  # multiprocessors of A100 and H100 SXM
HALF, SINGLE = 2, 4  # bytes of bfloat16 and float32
TUTORIAL = "Triton's fused-attention tutorial, written anew"
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(acc, weight_sum, top, q, K, V, begin, end, rows, scale, MASKED: tl.constexpr, D: tl.constexpr,
            BLOCK_N: tl.constexpr):
    """Takes in the keys begin .. end - 1. scale: times log2(e); top: the maximum so far of the scaled scores."""
    columns = tl.arange(0, D)
    for start in range(begin, end, BLOCK_N):
        keys = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        k = tl.load(K + keys[None, :] * D + columns[:, None])
        scores = tl.dot(q, k)
        if MASKED:
            scores = scores * scale + tl.where(rows[:, None] >= keys[None, :], 0.0, -1e6)
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.exp2(scores * scale - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        v = tl.load(V + keys[:, None] * D + columns[None, :])
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None])
        weight_sum = weight_sum * rescale + tl.sum(weights, 1)
        top = new_top
    return acc, weight_sum, top


@triton.jit
def attention_forward(Q, K, V, OUT, LSE, scale, T, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (i, j): queries i BLOCK_M .. of head j. LSE: base 2."""
    head = tl.program_id(1) * T
    first = tl.program_id(0) * BLOCK_M
    rows, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, D)
    at = (head + rows[:, None]) * D + columns[None, :]
    q = tl.load(Q + at)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    weight_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    scale *= LOG2E
    K += head * D
    V += head * D
    acc, weight_sum, top = _attend(acc, weight_sum, top, q, K, V, 0, first, rows, scale, False, D, BLOCK_N)
    acc, weight_sum, top = _attend(acc, weight_sum, top, q, K, V, first, first + BLOCK_M, rows, scale, True, D, BLOCK_N)
    tl.store(LSE + head + rows, top + tl.log2(weight_sum))
    tl.store(OUT + at, (acc / weight_sum[:, None]).to(OUT.dtype.element_ty))


@triton.jit
def attention_delta(OUT, DOUT, DELTA, T, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row sums of OUT * DOUT."""
    rows = tl.program_id(1) * T + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(DELTA + rows, tl.sum(tl.load(OUT + at) * tl.load(DOUT + at).to(tl.float32), 1))


@triton.jit
def _add_dk_dv(dk, dv, k, v, Q, DOUT, LSE, DELTA, begin, end, keys, MASKED: tl.constexpr, D: tl.constexpr,
               BLOCK_M: tl.constexpr):
    """Adds what the queries begin .. end - 1 give. k holds the scale and log2(e)."""
    columns = tl.arange(0, D)
    for start in range(begin, end, BLOCK_M):
        rows = tl.multiple_of(start, BLOCK_M) + tl.arange(0, BLOCK_M)
        q = tl.load(Q + rows[None, :] * D + columns[:, None])
        weights = tl.exp2(tl.dot(k, q) - tl.load(LSE + rows)[None, :])
        if MASKED:
            weights = tl.where(rows[None, :] >= keys[:, None], weights, 0.0)
        dout = tl.load(DOUT + rows[:, None] * D + columns[None, :])
        dv = tl.dot(weights.to(dout.dtype), dout, dv)
        dweights = tl.dot(v, tl.trans(dout)).to(tl.float32)
        dscores = weights * (dweights - tl.load(DELTA + rows)[None, :])
        dk = tl.dot(dscores.to(q.dtype), tl.trans(q), dk)
    return dk, dv


@triton.jit
def attention_dk_dv(Q, K, V, DOUT, LSE, DELTA, DK, DV, scale, T, D: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr):
    """The diagonal goes in steps of half a BLOCK_M."""
    head = tl.program_id(1) * T
    first = tl.program_id(0) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    at = (head + keys[:, None]) * D + tl.arange(0, D)[None, :]
    k, v = tl.load(K + at), tl.load(V + at)
    dk, dv = tl.zeros([BLOCK_N, D], tl.float32), tl.zeros([BLOCK_N, D], tl.float32)
    Q += head * D
    DOUT += head * D
    LSE += head
    DELTA += head
    end = first + BLOCK_N
    dk, dv = _add_dk_dv(dk, dv, k, v, Q, DOUT, LSE, DELTA, first, end, keys, True, D, BLOCK_M // 2)
    dk, dv = _add_dk_dv(dk, dv, k, v, Q, DOUT, LSE, DELTA, end, T, keys, False, D, BLOCK_M)
    tl.store(DV + at, dv.to(DV.dtype.element_ty))
    tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty))


@triton.jit
def _add_dq(dq, q, dout, lse, delta, K, V, begin, end, rows, MASKED: tl.constexpr, D: tl.constexpr,
            BLOCK_N: tl.constexpr):
    """Adds what the keys begin .. end - 1 give. K holds the scale and log2(e)."""
    columns = tl.arange(0, D)
    for start in range(begin, end, BLOCK_N):
        keys = tl.multiple_of(start, BLOCK_N) + tl.arange(0, BLOCK_N)
        transposed = keys[None, :] * D + columns[:, None]
        k, v = tl.load(K + transposed), tl.load(V + transposed)
        weights = tl.exp2(tl.dot(q, k) - lse[:, None])
        if MASKED:
            weights = tl.where(rows[:, None] >= keys[None, :], weights, 0.0)
        dscores = weights * (tl.dot(dout, v) - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), tl.trans(k), dq)
    return dq


@triton.jit
def attention_dq(Q, K, V, DOUT, LSE, DELTA, DQ, T, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The diagonal goes in steps of half a BLOCK_N."""
    head = tl.program_id(1) * T
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    at = (head + rows[:, None]) * D + tl.arange(0, D)[None, :]
    q, dout = tl.load(Q + at), tl.load(DOUT + at)
    lse, delta = tl.load(LSE + head + rows), tl.load(DELTA + head + rows)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    K += head * D
    V += head * D
    dq = _add_dq(dq, q, dout, lse, delta, K, V, first, first + BLOCK_M, rows, True, D, BLOCK_N // 2)
    dq = _add_dq(dq, q, dout, lse, delta, K, V, 0, first, rows, False, D, BLOCK_N)
    tl.store(DQ + at, (dq / LOG2E).to(DQ.dtype.element_ty))


# The tutorial's list for the forward pass (a causal one needs BLOCK_N <= BLOCK_M), of which the rival gets the best by
# predicted efficiency: (BLOCK_M, BLOCK_N, stages, warps)
FORWARD = [c for c in itertools.product((64, 128), (32, 64, 128), (2, 3, 4), (4, 8)) if c[1] <= c[0]]
# Its fixed choice for the backward pass is (BLOCK_M, BLOCK_N) with 4 warps and 5 stages, the first of these (warps,
# stages), or as many of them as fit. There one kernel gives dk and dv first and then dq; here each has its own, which
# leaves both more registers. "Retuned" is the best of them all, since the fixed choice spills at D = 128.
BACKWARD = list(itertools.product((4, 8), (5, 3, 2)))
DK_DV, DQ = {"BLOCK_M": 32, "BLOCK_N": 128}, {"BLOCK_M": 128, "BLOCK_N": 32}
DELTA_ROWS = 128
SMALL = {"T": "i32", "scale": "fp32", "LSE": "*fp32", "DELTA": "*fp32"}


def attention_row(arch, name, kernel, D, sizes, num_warps, num_stages, flops_per_pair=0, useful=0):
    """A compiled configuration, T a multiple of 16. flops_per_pair: for each query, key and column of a tile."""
    constants = {"D": D, **sizes}
    signature = {a: "constexpr" if a in constants else SMALL.get(a, "*bf16") for a in kernel.arg_names}
    divisible = [a for a in signature if a == "T" or signature[a].startswith("*")]
    compiled = compile_kernel(kernel, signature, constants, divisible, arch, num_warps, num_stages)
    flops = flops_per_pair * D * sizes["BLOCK_M"] * sizes.get("BLOCK_N", 0)
    return row(f"attention {name}, D = {D}", kernel, TUTORIAL, arch, constants, num_warps, num_stages, compiled, useful,
               useful, flops)


def row(name, kernel, source, arch, constants, num_warps, num_stages, compiled, useful, moved, flops=0):
    """With all that `describe` says. Bytes are one program's, in device memory; moved: with what it reads again."""
    description = describe(compiled.asm["cubin"], arch, num_warps, compiled.metadata.shared, flops)
    return {"name": name, "kernel": kernel.__name__, "source": source, "arch": arch,
            "config": {**constants, "num_warps": num_warps, "num_stages": num_stages},
            "useful_bytes_per_program": useful, "moved_bytes_per_program": moved, **description}


def forward_row(arch, D):
    """The most efficient of the tutorial's configurations among those that fit and do not spill."""
    found = [attention_row(arch, "forward", attention_forward, D, {"BLOCK_M": m, "BLOCK_N": n}, warps, stages, 4)
             for m, n, stages, warps in FORWARD]
    return max(found, key=lambda r: (r["spills"] == 0, efficiency(r)))


def backward_rows(arch, name, kernel, D, sizes, flops_per_pair):
    found = [attention_row(arch, name, kernel, D, sizes, *choice, flops_per_pair) for choice in BACKWARD]
    fitting = [r for r in found if r["blocks"]]
    best = max(fitting, key=efficiency)
    return fitting[0], {**best, "name": f"{best['name']}, retuned"}


def efficiency(found):
    return found["efficiency"] or 0.0


def attention_rows(arch):
    for D in HEAD_WIDTHS:
        yield forward_row(arch, D)
        yield attention_row(arch, "delta", attention_delta, D, {"BLOCK_M": DELTA_ROWS}, 4, 1,
                            useful=DELTA_ROWS * (2 * D * HALF + SINGLE))
        yield from backward_rows(arch, "dk, dv", attention_dk_dv, D, DK_DV, 8)
        yield from backward_rows(arch, "dq", attention_dq, D, DQ, 6)


class _Launch:
    """Takes a kernel's place in its module and notes the arguments instead of starting it."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self._note

    def _note(self, *arguments, num_warps, **named):
        given = {**dict(zip(self.kernel.arg_names, arguments)), **named}
        self.num_warps = num_warps
        self.constants = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr}
        # `specialise` goes by the constants where it has both
        self.arguments = [0.0 if name in self.constants else given[name] for name in self.kernel.arg_names]

    def compile(self, arch):
        signature, constants, divisible = specialise(self.kernel, self.arguments, self.constants)
        return compile_kernel(self.kernel, signature, constants, divisible, arch, self.num_warps, LIGER_STAGES)


LIGER_STAGES = 3  # triton's default: Liger's launchers name none


@contextlib.contextmanager
def noted(module, name):
    kernel = getattr(module, name)
    launch = _Launch(kernel)
    setattr(module, name, launch)
    try:
        yield launch
    finally:
        setattr(module, name, kernel)


def liger(module):
    try:
        return importlib.import_module(f"liger_kernel.ops.{module}")
    except ImportError as error:
        raise ImportError("pip install --no-deps liger-kernel: its kernels are what ours are held against") from error


def matrix(columns, rows=ROWS, dtype=torch.bfloat16, **options):
    return torch.empty((rows, columns), dtype=dtype, device="meta", **options)


def liger_layer_norm(arch):
    module, row_bytes = liger("layer_norm"), HIDDEN * HALF
    x, weight = matrix(HIDDEN), matrix(HIDDEN)[0]
    statistics = matrix(1, dtype=torch.float32)[:, 0].contiguous()
    with noted(module, "_layer_norm_forward_kernel") as launch:
        module.layer_norm_forward(x, weight, weight, 1e-5)
    useful = 2 * row_bytes + 2 * SINGLE
    yield "layer norm forward", launch, useful, useful
    with noted(module, "_layer_norm_backward_kernel") as launch:
        module.layer_norm_backward(x, x, weight, weight, statistics, statistics)
    rows = launch.constants["rows_per_program"] = -(-ROWS // PROCESSORS[arch])  # one program on each, on a GPU
    useful = rows * (3 * row_bytes + 2 * SINGLE)
    yield "layer norm backward", launch, useful, useful + 2 * HIDDEN * SINGLE


def liger_geglu(arch):
    module, row_bytes = liger("geglu"), GEGLU_WIDTH * HALF
    a = matrix(GEGLU_WIDTH)
    with noted(module, "_geglu_tanh_forward_kernel") as launch:
        module.geglu_forward(a, a)
    yield "GEGLU forward", launch, 3 * row_bytes, 3 * row_bytes
    with noted(module, "_geglu_tanh_backward_kernel") as launch:
        module.geglu_backward(a, a, a)
    yield "GEGLU backward", launch, 5 * row_bytes, 5 * row_bytes


def liger_cross_entropy(arch):
    """Loss and gradient in one kernel: it reads the row twice and writes it once, all 2 bytes wide, since the row's
    length is odd."""
    module, row_bytes = liger("cross_entropy"), VOCABULARY * HALF
    logits, targets = matrix(VOCABULARY, requires_grad=True), torch.zeros(ROWS, dtype=torch.int64)
    with noted(module, "liger_cross_entropy_kernel") as launch:
        module.cross_entropy_forward(logits, targets, None, -100, 0.0, 0.0, "mean", None, False)
    rest = targets.element_size() + HALF
    yield "cross entropy", launch, 2 * row_bytes + rest, 3 * row_bytes + rest


def liger_rows(arch):
    for group in (liger_layer_norm, liger_geglu, liger_cross_entropy):
        for name, launch, useful, moved in group(arch):
            yield row(name, launch.kernel, f"Liger-Kernel {importlib.metadata.version('liger-kernel')}", arch,
                      launch.constants, launch.num_warps, LIGER_STAGES, launch.compile(arch), useful, moved)


def rows(arch):
    """All rivals on sm_80 or sm_90, as `row` has them."""
    return [*attention_rows(arch), *liger_rows(arch)]
