"""Every SPEC of the Triton kernels: its source interpreted, its compiled code executed, against the reference in float64."""
import pytest

pytest.importorskip("triton")

import torch
from executors import Interpreter, MachineCode, running
from interpreter import strict
from numerics import THREE_TF32, check_compiled, check_op
from prediction import record, specs

from fastgpt import kernels, ops, reference

kernels.load()
SPECS = {spec.name: spec for module in kernels.MODULES for spec in getattr(module, "SPECS", ())}
ARCHS = [80, 90]
# One of each op, where its other calls would show nothing more.
ONE_OF_EACH = ["attention, GQA", "packed_attention", "cross_entropy", "cross_entropy of rows", "bias_gelu",
               "add_layer_norm, dropout"]
# The compiled code of the other dtypes is that of bfloat16 but for its loads, stores and products.
OTHER_DTYPES = [("float16", 80), ("float32", 90)]
COMPILED = [*((name, str(spec.dtype).removeprefix("torch."), arch) for name, spec in SPECS.items() for arch in ARCHS),
            *((name, dtype, arch) for name in ("attention", "add_layer_norm", "bias_gelu, tanh", "cross_entropy")
              for dtype, arch in OTHER_DTYPES)]


def call(spec, module, others):
    """The op as a function of the tensors that have gradients, in the spec's order."""
    def function(*tensors):
        return getattr(module, spec.op)(**dict(zip(names, tensors)), **others, **spec.options)
    names = list(spec.inputs(torch.float32, "meta", False)[0])
    return function


def check(spec, dtype):
    inputs, others = spec.inputs(dtype, "cpu", False)
    unit = THREE_TF32 if dtype == torch.float32 and "attention" in spec.op else None
    check_op(call(spec, ops, others), inputs, call(spec, reference, others), unit=unit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SPECS)
def test_interpreted_with_its_programs_in_any_order(name, dtype):
    with running(Interpreter()), strict(shuffle=1):
        check(SPECS[name], getattr(torch, dtype))


@pytest.mark.parametrize("name, dtype, arch", COMPILED)
def test_compiled(name, dtype, arch):
    with running(MachineCode(arch)):
        check(SPECS[name], getattr(torch, dtype))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 1, 1, 5, 16), (2, 1, 5, 1, 1), (1, 2, 1, 1, 16)], ids=str)
def test_sizes_of_one(sizes):
    """A launcher makes a constant of an argument that is 1: kernels must compile with each of them."""
    B, H, T, S, D = sizes
    q, k, v = (torch.randn(B, heads, n, D).bfloat16() for heads, n in ((H, T), (1, S), (1, S)))
    x, weight = torch.randn(T, D).bfloat16(), torch.randn(D).bfloat16()
    with running(MachineCode(90)):
        leaves = [t.requires_grad_() for t in (q, k, v)]
        ops.attention(*leaves, window=1).sum().backward()
        out = ops.attention(*leaves)
        results = out, ops.bias_gelu(x, weight), ops.layer_norm(x, weight), ops.cross_entropy(x, x, torch.arange(T))
    references = (reference.attention(q, k, v), reference.bias_gelu(x, weight), reference.layer_norm(x, weight),
                  reference.cross_entropy(x, x, torch.arange(T)))
    for result, expected in zip(results, references):
        torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_same_bits_in_any_order_of_programs(name):
    spec = SPECS[name]
    inputs, others = spec.inputs(torch.bfloat16, "cpu", False)
    results = []
    for shuffle in (None, 2):
        leaves = [t.clone().requires_grad_() for t in inputs.values()]
        with running(Interpreter()), strict(shuffle=shuffle):
            outputs = call(spec, ops, others)(*leaves)
            outputs = [o for o in (outputs if isinstance(outputs, tuple) else [outputs]) if o.requires_grad]
            gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        results.append((*outputs, *gradients))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiles_whole_to_the_same_bits(name):
    """As one graph, forward and backward, in which the op is used twice."""
    spec = SPECS[name]
    inputs, others = spec.inputs(torch.float32, "cpu", False)
    leaves = [t.requires_grad_() for t in inputs.values()]
    function = call(spec, ops, others)

    def twice(first, *rest):
        both = function(first, *rest), function(2 * first, *rest)
        both = [result if isinstance(result, tuple) else (result,) for result in both]
        return sum((a * b).sum() for a, b in zip(*both))
    torch._dynamo.reset()  # one function of many specs would be compiled too often
    with running(Interpreter()):
        check_compiled(twice, leaves)


def library_calls():
    """(op of torch.library, arguments), with dropout where it is."""
    def t(*shape):
        return torch.randn(shape, requires_grad=True)
    seed, starts = torch.tensor(7), torch.tensor([0, 2, 5], dtype=torch.int32)
    loss = t(5, 8), t(9, 8), t(9), torch.arange(5), -100, 0.1, 1e-3
    return {
        "layer_norm": (t(5, 8), t(8), t(8), 1e-5),
        "add_layer_norm": (t(5, 8), t(5, 8), t(8), None, seed, 1e-5, 0.25),
        "gelu": (t(5, 8), t(8), True),
        "attention": (t(1, 4, 5, 8), t(1, 2, 6, 8), t(1, 2, 6, 8), torch.ones(1, 6) > 0, seed, True, 0.3, 0.25, 4, True),
        "packed_attention": (t(5, 4, 8), t(5, 2, 8), t(5, 2, 8), starts, starts, None, True, 0.3, 0.0, 0, True),
        "attention_weights": (*(x.detach() for x in (t(1, 4, 5, 8), t(1, 2, 6, 8), t(1, 4, 5))), torch.tensor([3, 1]), torch.tensor([4]),
                              torch.ones(1, 6) > 0, True, 0.3, 4),
        "cross_entropy": (*loss, True, [True, True, True]),
        "cross_entropy_rows": loss,
    }


@pytest.mark.parametrize("name, arguments", library_calls().items())
def test_library_ops(name, arguments):
    """As PyTorch wants them: schema, fake outputs, autograd, tracing."""
    with running(Interpreter()):
        torch.library.opcheck(getattr(torch.ops.fastgpt, f"triton_{name}").default, arguments)


def test_offsets_beyond_32_bits(tmp_path):
    """Heads 2**30 elements apart: in a file that has no blocks but those that are written."""
    heads, rows, D, apart = 4, 5, 16, 2 ** 30
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=heads * apart, dtype=torch.float16)
    k = memory.as_strided((1, heads, rows, D), (heads * apart, apart, D, 1))
    k.copy_(torch.randn(1, heads, rows, D))
    q, v = torch.randn(2, 1, heads, rows, D).half()
    with running(Interpreter()), strict(races=False):
        out = ops.attention(q, k, v)
    torch.testing.assert_close(out, reference.attention(q, k.contiguous(), v), rtol=2e-3, atol=2e-3)


def test_rows_beyond_offsets_of_32_bits(tmp_path):
    rows, D, apart = 70, 16, 2 ** 25
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=rows * apart, dtype=torch.float16)
    k = memory.as_strided((1, 1, rows, D), (rows * apart, rows * apart, apart, 1))
    k.copy_(torch.randn(1, 1, rows, D))
    q, v = torch.randn(2, 1, 1, rows, D).half()
    with running(Interpreter()):
        out = ops.attention(q, k, v)
    torch.testing.assert_close(out, reference.attention(q, k.contiguous(), v), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.name)
def test_byte_counts_are_those_of_the_tensors(spec):
    """BYTES at GPT-2's sizes, against the tensors that the launches get: each once, but logits as often as a row is passed."""
    for launch in record(spec, 90):
        tensors = {n: t for n, t in launch.arguments.items() if isinstance(t, torch.Tensor) and t.numel() > 1e5}
        passes = {"LOGITS": 1 + 2 * launch.constants.get("HAS_GRADIENT", 0)}
        counted = sum(t.numel() * t.element_size() * passes.get(name, 1) for name, t in tensors.items())
        assert counted == pytest.approx(launch.value("BYTES"), rel=0.03), launch.name


def test_every_kernel_has_a_spec_that_runs_it():
    run = {launch.name for spec in specs() for launch in record(spec, 80)}
    written = {name for module in kernels.MODULES for name, value in vars(module).items()
               if name.endswith("_kernel") and value.__module__ == module.__name__}
    assert run == written == {name for module in kernels.MODULES for name in module.BYTES}
