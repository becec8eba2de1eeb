"""What is measured: every op at GPT-2's shapes, PyTorch's own op or sequence, the work it comes to, and its target.

Shapes: B batch, T length, M = B * T rows, C channels, H heads, D head size, K and N a matrix's input and output, V
vocabulary.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from fastgpt import ops, reference

FORWARD, BOTH = "forward", "forward + backward"
INPUT_GRADIENT, WEIGHT_GRADIENT = "input gradient", "weight gradient"
NOT_SLOWER = {"ratio": 1.0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    batch: int = 4
    length: int = 256
    lengths: tuple = ((4, 128), (4, 256), (1, 512), (1, 1024))  # attention's (B, T)
    channels: int = 768
    heads: int = 12
    vocab: int = 50257


SIZES = {"gpt2": Sizes(), "tiny": Sizes(2, 8, ((2, 8), (1, 19)), 24, 3, 65)}


@dataclass(frozen=True, eq=False)
class Case:
    op: str  # its name in fastgpt.ops
    what: str
    shape: str
    make: object  # (dtype, generator) -> the op's tensors by name
    ours: object  # tensors by keyword -> output, or a tuple of them
    pytorch: object
    truth: object  # the reference, given float64
    flops: float  # 0 where memory is what counts
    targets: dict  # dtype -> {"ratio": at least, "share": at least, "memory": at most}

    @property
    def key(self):
        return f"{self.op}, {self.what}, {self.shape}"

    def wanted(self, inputs):
        """The names of the tensors whose gradients are taken."""
        if self.what == FORWARD:
            return []
        only = {INPUT_GRADIENT: ["x"], WEIGHT_GRADIENT: ["weight", "bias"]}.get(self.what, list(inputs))
        return [name for name in only if inputs[name].is_floating_point()]


def step(case, function, inputs):
    """A callable that does the case's work once, on `function`, and returns the outputs and gradients as one tuple."""
    wanted = case.wanted(inputs)
    leaves = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in inputs.items()}

    def forward():
        outputs = function(**leaves)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    if not wanted:
        return forward
    targets = [leaves[name] for name in wanted]
    dtype = next(t.dtype for t in inputs.values() if t.is_floating_point())
    gradients = _gradients(forward(), dtype)
    if case.what == BOTH:
        def both():
            outputs = forward()
            return *outputs, *torch.autograd.grad(outputs, targets, gradients)
        return both
    outputs = forward()
    return lambda: torch.autograd.grad(outputs, targets, gradients, retain_graph=True)


def _gradients(outputs, dtype):
    """The same numbers for every implementation: what a bfloat16 can hold, whatever the outputs' own dtype."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) if o.dim() else torch.ones_like(o)
            for o in outputs]


def result_names(case, inputs, results):
    """A name for each tensor that `step` returns."""
    gradients = [f"gradient of {name}" for name in case.wanted(inputs)]
    return [f"output {i}" for i in range(len(results) - len(gradients))] + gradients


def traffic(case, inputs, results):
    """The bytes that must move at least: what the work needs is read once a pass, each result written once."""
    size = {name: t.nbytes for name, t in inputs.items()}
    written = sum(t.nbytes for t in results)
    if case.what == FORWARD:
        return sum(size.values()) + written
    if case.what == BOTH:
        # The outputs' gradients, as large as they are, are read.
        outputs = sum(t.nbytes for t in results[:-len(case.wanted(inputs))])
        return 2 * sum(size.values()) + written + outputs
    x, weight = inputs["x"], inputs["weight"]
    incoming = x.nbytes // weight.shape[1] * weight.shape[0]  # the output's gradient
    return incoming + written + size["weight" if case.what == INPUT_GRADIENT else "x"]


def all_cases(sizes=SIZES["gpt2"]):
    return [*_norms(sizes), *_gelus(sizes), *_linears(sizes), *_attentions(sizes), *_losses(sizes)]


def _random(shapes, dtype, generator):
    """Normal numbers; a matrix `weight` is scaled as in a model, so that outputs stay near 1."""
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "weight" in shapes and len(shapes["weight"]) == 2:
        tensors["weight"] *= shapes["weight"][1] ** -0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


def _case(op, what, shape, shapes, *, flops=0, targets=NOT_SLOWER, pytorch=None, make=None, **options):
    targets = targets if set(targets) == set(DTYPES) else dict.fromkeys(DTYPES, targets)
    return Case(op, what, shape, make or partial(_random, shapes), partial(getattr(ops, op), **options),
                pytorch or partial(getattr(reference, op), **options), partial(getattr(reference, op), **options),
                flops, targets)


def _norms(s):
    rows = (s.batch, s.length, s.channels)
    vectors = {"weight": (s.channels,), "bias": (s.channels,)}
    label = "x".join(map(str, rows))
    for what in (FORWARD, BOTH):
        yield _case("layer_norm", what, label, {"x": rows, **vectors})
    for what in (FORWARD, BOTH):
        yield _case("add_layer_norm", what, label, {"x": rows, "residual": rows, **vectors}, targets={"ratio": 1.5})


def _gelus(s):
    rows = (s.batch, s.length, 4 * s.channels)
    label = "x".join(map(str, rows))
    for approximate in ("none", "tanh"):
        shape = label + (", tanh" if approximate == "tanh" else "")
        for what in (FORWARD, BOTH) if approximate == "none" else (BOTH,):
            yield _case("gelu", what, shape, {"x": rows}, approximate=approximate)
            yield _case("bias_gelu", what, shape, {"x": rows, "bias": rows[-1:]}, targets={"ratio": 1.5},
                        approximate=approximate)


def _linears(s):
    M, C = s.batch * s.length, s.channels
    targets = {"float32": {"ratio": 1.9, "share": 0.8}, "bfloat16": NOT_SLOWER}
    for K, N in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)):
        shapes = {"x": (M, K), "weight": (N, K), "bias": (N,)}
        for what in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT):
            yield _case("linear", what, f"{M}x{K} -> {N}", shapes, flops=2 * M * N * K, targets=targets)
    shapes = {"x": (M, C), "weight": (4 * C, C), "bias": (4 * C,)}
    for what, products in ((FORWARD, 1), (BOTH, 3)):
        yield _case("linear", what, f"{M}x{C} -> {4 * C}, gelu", shapes, flops=products * 8 * M * C * C,
                    targets=targets, activation="gelu")
    shapes = {"x": (M, C), "weight": (C, C), "bias": (C,), "residual": (M, C)}
    yield _case("linear", FORWARD, f"{M}x{C} -> {C}, residual", shapes, flops=2 * M * C * C, targets=targets)


def _attentions(s):
    D = s.channels // s.heads
    for B, T in s.lengths:
        shape = (B, s.heads, T, D)
        pairs = T * (T + 1) // 2  # that causality leaves
        products = 2 * (2 * B * s.heads * D * pairs)  # q with k, and the weights with v
        for what, times, target in ((FORWARD, 1.0, 1.0), (BOTH, 3.5, 1.3)):
            yield _case("attention", what, "x".join(map(str, shape)), {"q": shape, "k": shape, "v": shape},
                        flops=times * products, targets={"ratio": target}, pytorch=_sdpa)


def _sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _losses(s):
    # PyTorch's bfloat16 products can be a hundred times slower than its float32 ones where the processor has no such
    # instructions, hence the few rows.
    for M, dtypes in ((s.batch * s.length, ("float32",)), (s.length // 2, ("bfloat16",))):
        make = partial(_loss_inputs, M, s.channels, s.vocab)
        for what, products, memory in ((FORWARD, 1, {}), (BOTH, 3, {"memory": 1 / 3})):
            case = _case("cross_entropy", what, f"{M}x{s.channels} -> {s.vocab}", None, make=make,
                         flops=products * 2 * M * s.channels * s.vocab)
            yield Case(**{**vars(case), "targets": {dtype: {"ratio": 1.0, **memory} for dtype in dtypes}})


def _loss_inputs(M, K, V, dtype, generator):
    tensors = _random({"x": (M, K), "weight": (V, K)}, dtype, generator)
    return tensors | {"targets": torch.randint(V, (M,), generator=generator)}
