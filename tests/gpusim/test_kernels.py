"""Every SPEC of the Triton kernels: its source interpreted, its compiled code executed, against the reference in float64."""
import pytest

pytest.importorskip("triton")

import torch
from executors import Interpreter, MachineCode, Recorder, running
from interpreter import strict
from numerics import THREE_TF32, check_op

from fastgpt import kernels, ops, reference

kernels.load()
SPECS = {spec.name: spec for module in kernels.MODULES for spec in getattr(module, "SPECS", ())}
ARCHS = [80, 90]
# The compiled code of the other dtypes is that of bfloat16 but for its loads, stores and products.
OTHER_DTYPES = ["attention", "add_layer_norm", "bias_gelu, tanh", "cross_entropy"]
COMPILED = [*((name, "bfloat16") for name in SPECS),
            *((name, dtype) for name in OTHER_DTYPES for dtype in ("float16", "float32"))]


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


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name, dtype", COMPILED)
def test_compiled(name, dtype, arch):
    with running(MachineCode(arch)):
        check(SPECS[name], getattr(torch, dtype))


@pytest.mark.parametrize("name", SPECS)
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


@pytest.mark.parametrize("name", SPECS)
def test_byte_counts_are_those_of_the_tensors(name):
    """BYTES, at GPT-2's sizes, against the tensors that the launches get: each once, unless it is read and written."""
    for kernel, arguments, constants in launches(SPECS[name], 90):
        tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.numel() > 1e5]
        counted = sum(t.numel() * t.element_size() * passes(kernel, arguments, constants, t) for t in tensors)
        assert counted == pytest.approx(bytes_moved(kernel, arguments, constants), rel=0.02), kernel


def launches(spec, arch):
    """(kernel's name, arguments by name, constants) of a forward and backward at GPT-2's sizes."""
    inputs, others = spec.inputs(torch.bfloat16, "meta", True)
    with running(Recorder(arch), "meta") as recorder:
        leaves = [t.requires_grad_() for t in inputs.values()]
        outputs = call(spec, ops, others)(*leaves)
    return recorder
