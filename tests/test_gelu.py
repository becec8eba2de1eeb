from functools import partial
from math import inf, nan

import pytest
import torch
from numerics import check_op

from fastgpt import extension, ops, reference

# (2100, 3): more rows than partial sums; (2, 8200): more columns than a task takes.
SHAPES = [(1,), (1, 1), (3, 7), (2, 5, 16), (33, 59), (4, 9, 96), (2100, 3), (2, 8200), (0, 8), (3, 0)]
FORMS = ["none", "tanh"]


def both(op, approximate):
    return (partial(getattr(module, op), approximate=approximate) for module in (ops, reference))


def value_and_derivative(x, approximate):
    x = x.requires_grad_()
    y = ops.gelu(x, approximate)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("op", ["gelu", "bias_gelu"])
def test_values_and_gradients(op, approximate, shape, dtype, implementation):
    inputs = {"x": 3 * torch.randn(shape, dtype=dtype), "bias": torch.randn(shape[-1], dtype=dtype)}
    if op == "gelu":
        del inputs["bias"]
    ours, truth = both(op, approximate)
    check_op(ours, inputs, truth)


@pytest.mark.parametrize("approximate", FORMS)
def test_relative_accuracy_in_the_negative_tail(approximate, level):
    x = torch.linspace(-9.5, 0, 10007)
    d = x.double()
    if approximate == "none":
        truth = d * torch.special.erfc(-d / 2 ** 0.5) / 2
    else:
        truth = d * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (d + 0.044715 * d ** 3))
    errors = (ops.gelu(x, approximate) - truth).abs() / truth.abs().clamp(min=1e-300)
    assert errors.max() < 8 * 2 ** -23, f"{errors.max() * 2 ** 23:.1f} units at {x[errors.argmax()]}"


@pytest.mark.parametrize("approximate", FORMS)
def test_special_values(approximate, dtype, level):
    x = torch.tensor([inf, -inf, nan, 1e30, -1e30, 50.0, -50.0, 0.0, -0.0], dtype=dtype)
    y, dx = value_and_derivative(x, approximate)
    expected = torch.tensor([inf, 0, nan, 1e30, 0, 50, 0, 0, 0], dtype=dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(y)[[1, 4, 6, 8]].all() and not torch.signbit(y)[[0, 3, 5, 7]].any()
    torch.testing.assert_close(dx, torch.tensor([1, 0, nan, 1, 0, 1, 0, .5, .5], dtype=dtype), rtol=0, atol=0,
                               equal_nan=True)


def test_strided_input_and_gradient(implementation):
    x, bias = torch.randn(6, 24, 5).transpose(1, 2), torch.randn(48)[::2]
    check_op(ops.bias_gelu, {"x": x, "bias": bias}, reference.bias_gelu)
    leaf = x.clone().requires_grad_()
    expanded = torch.autograd.grad(ops.gelu(leaf).sum(), leaf)[0]  # a gradient of stride 0
    assert torch.equal(expanded, torch.autograd.grad(ops.gelu(leaf), leaf, torch.ones(x.shape))[0])


def test_a_wider_bias_widens_the_sum(implementation):
    x, bias = torch.randn(5, 40).bfloat16().requires_grad_(), torch.randn(40, requires_grad=True)
    y = ops.bias_gelu(x, bias)
    assert torch.equal(y, ops.bias_gelu(x.float(), bias)) and y.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, bias))] == [torch.bfloat16, torch.float32]


def test_same_bits_on_any_number_of_threads(level):
    x, bias, dy = torch.randn(301, 96), torch.randn(96), torch.randn(301, 96)
    results = []
    before = extension.get_num_threads()
    for count in (1, 2, 3):
        extension.set_num_threads(count)
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = ops.bias_gelu(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    extension.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("frozen", ["x", "bias"])
def test_one_gradient_alone(frozen):
    leaves = {"x": torch.randn(40, 8, requires_grad=True), "bias": torch.randn(8, requires_grad=True)}
    both = dict(zip(leaves, torch.autograd.grad(ops.bias_gelu(**leaves).sum(), leaves.values())))
    leaves[frozen] = leaves[frozen].detach()
    (wanted,) = leaves.keys() - {frozen}
    assert torch.equal(torch.autograd.grad(ops.bias_gelu(**leaves).sum(), leaves[wanted])[0], both[wanted])


@pytest.mark.parametrize("bias", [None, torch.randn(8)], ids=["gelu", "bias_gelu"])
def test_library_op(bias, dtype):
    bias = None if bias is None else bias.to(dtype).requires_grad_()
    x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.fastgpt.gelu.default, (x, bias, True))


def test_compiled_with_backward():
    x, bias = torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    compiled = torch.compile(ops.bias_gelu, fullgraph=True, backend="aot_eager")
    results = []
    for function in (ops.bias_gelu, compiled):
        y = function(x, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, bias))))
    assert all(map(torch.equal, *results))


def test_autocast_leaves_the_dtype_alone(dtype):
    x = torch.randn(4, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.gelu(x), ops.gelu(x)) and ops.gelu(x).dtype == dtype


@pytest.mark.parametrize("call, error, message", [
    (lambda: ops.gelu(torch.randn(3), "sigmoid"), ValueError, "gelu: approximate must be 'none' or 'tanh', got"),
    (lambda: ops.gelu(torch.arange(3)), TypeError, "gelu: x must have a floating dtype, got torch.int64"),
    (lambda: ops.bias_gelu(torch.randn(2, 8), torch.randn(7)), ValueError, r"bias must have shape \(8,\), got \(7,\)"),
    (lambda: ops.bias_gelu(torch.tensor(1.0), torch.randn(1)), ValueError, "x must have at least one dimension"),
])
def test_broken_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
