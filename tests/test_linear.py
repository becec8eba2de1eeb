import contextlib
import copy
import importlib
from functools import partial

import pytest
import torch
from numerics import assert_accurate, check_op
from torch.utils.checkpoint import checkpoint

from fastgpt import extension, ops, reference
from fastgpt.autograd import tensors
from fastgpt.cpu.gemm import matmul

LINEAR = importlib.import_module("fastgpt.cpu.linear")  # the attribute of that name is the op
# rows, K, N: odd, empty, one, and more than one block of K (384 or 256)
SHAPES = [(1, 1, 1), (7, 3, 5), (33, 59, 111), (2, 400, 65), (5, 0, 3), (0, 8, 4), (19, 800, 17), (130, 17, 64)]
# M, K, N of plain products: more than a block of rows, of columns, of both; tails of every tile
PRODUCTS = [(1, 1, 1), (3, 385, 70), (16, 64, 33), (200, 5, 1050), (301, 770, 48), (5, 0, 7), (0, 3, 2), (2, 3, 0)]


def make(M, K, N, dtype=torch.float32):
    return {"x": torch.randn(M, K, dtype=dtype), "weight": torch.randn(N, K, dtype=dtype) / max(1, K) ** 0.5,
            "bias": torch.randn(N, dtype=dtype), "residual": torch.randn(M, N, dtype=dtype)}


def with_activation(module, activation):
    return lambda x, weight, bias, residual: module.linear(x, weight, bias, activation=activation, residual=residual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_values_and_gradients(shape, activation, dtype, level):
    with ops.backend("cpp"):
        check_op(with_activation(ops, activation), make(*shape, dtype), with_activation(reference, activation))


# What is before a linear layer: a function of x, of 30 columns, and a vector of 30
BEFORE = {"layer_norm": lambda x, vector: ops.layer_norm(x, vector),
          "residual": lambda x, vector: ops.linear(x, torch.eye(30, dtype=x.dtype), vector, activation="gelu", residual=x),
          **{name: lambda x, vector, name=name: ops.linear(x, torch.eye(30, dtype=x.dtype), vector, activation=name)
             for name in ("gelu", "gelu_tanh", "relu")}}


@pytest.fixture
def recipes_for_all(monkeypatch):
    monkeypatch.setattr(tensors, "LARGE", 0)


def behind(before, x, vector, weight, change=None, keep=False):
    """-> (what is before, the linear layer behind it)"""
    y = BEFORE[before](x, vector)
    y = y if change is None else change(y)
    return y, ops.linear(y.clone() if keep else y, weight)


def leaves_of(dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((40, 30), (30,), (20, 30))]


@pytest.mark.usefixtures("recipes_for_all")
@pytest.mark.parametrize("change", [None, lambda y: y.mul_(3.0)], ids=["", "changed"])
@pytest.mark.parametrize("before", BEFORE)
def test_the_input_is_made_again_unless_it_was_changed(before, change, dtype, level):
    """It takes no memory, but behind a residual; the gradients are those of one that is kept."""
    if dtype == torch.bfloat16 and LINEAR.bfloat16_product()[0] == "torch":
        pytest.skip("PyTorch's product keeps its input")
    leaves, dy = leaves_of(dtype), torch.randn(40, 20, dtype=dtype)
    y, out = behind(before, *leaves, change)
    kept = any(t is not None and t.data_ptr() == y.data_ptr() for t in out.grad_fn.saved_tensors)
    assert kept == (before == "residual" or change is not None)
    again = torch.autograd.grad(out, leaves, dy)
    expected = torch.autograd.grad(behind(before, *leaves, change, keep=True)[1], leaves, dy)
    if dtype == torch.float32:
        assert all(map(torch.equal, again, expected))
    for actual, wanted in zip(again, expected):  # in bfloat16 the activation's input is rounded before it is made again
        torch.testing.assert_close(actual, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


@pytest.mark.usefixtures("recipes_for_all")
@pytest.mark.parametrize("ingredient", [0, 1])
def test_the_input_is_kept_when_what_it_was_made_of_has_changed(ingredient):
    x, vector, weight = leaves_of()
    y, dy = ops.layer_norm(x, vector), torch.randn(40, 20)
    with torch.no_grad():
        (x, vector)[ingredient].mul_(torch.randn(30))
    torch.testing.assert_close(torch.autograd.grad(ops.linear(y, weight), weight, dy)[0], dy.t() @ y.detach())


@pytest.mark.usefixtures("recipes_for_all")
def test_a_tensor_with_a_recipe_can_be_saved_and_loaded(tmp_path):
    x, vector, weight = leaves_of()
    y = ops.layer_norm(x, vector)
    torch.save(y, tmp_path / "y")
    loaded = torch.load(tmp_path / "y", weights_only=True).detach().requires_grad_()
    for copied in (loaded, copy.copy(y)):
        assert torch.equal(copied, y) and torch.equal(ops.linear(copied, weight), ops.linear(y, weight))


@pytest.mark.usefixtures("recipes_for_all")
@pytest.mark.parametrize("hooks", [contextlib.nullcontext, torch.autograd.graph.save_on_cpu], ids=["", "save_on_cpu"])
@pytest.mark.parametrize("before", ["layer_norm", "gelu"])
def test_checkpointing_between(before, hooks):
    """Where forward runs once more, with another tensor in the input's place."""
    leaves, dy = leaves_of(), torch.randn(40, 20)

    def inner(y):
        return checkpoint(lambda t: ops.linear(t, leaves[2]), y, use_reentrant=False)

    with hooks():
        out = checkpoint(lambda x, vector: inner(BEFORE[before](x, vector)), *leaves[:2], use_reentrant=False)
    expected = torch.autograd.grad(behind(before, *leaves)[1], leaves, dy)
    assert all(map(torch.equal, torch.autograd.grad(out, leaves, dy), expected))


@pytest.mark.parametrize("missing", [("bias",), ("residual",), ("bias", "residual")], ids="+".join)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_without_bias_or_residual(missing, activation, dtype, level):
    inputs = make(9, 20, 35, dtype) | dict.fromkeys(missing)
    check_op(with_activation(ops, activation), inputs, with_activation(reference, activation))


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40)], ids=str)
def test_leading_dimensions(shape, level):
    x, weight, bias = torch.randn(shape), torch.randn(24, 40), torch.randn(24)
    check_op(ops.linear, {"x": x, "weight": weight, "bias": bias}, reference.linear)


def test_strided_inputs(dtype, level):
    x, weight = torch.randn(6, 40, 5, dtype=dtype).transpose(1, 2), torch.randn(48, 40, dtype=dtype).t()[:, ::2][:31]
    bias, residual = torch.randn(62, dtype=dtype)[::2], torch.randn(31, 5, 6, dtype=dtype).permute(2, 1, 0)
    x = x[..., :24]
    check_op(ops.linear, {"x": x, "weight": weight, "bias": bias}, reference.linear)
    dense = ops.linear(x.clone(), weight.clone(), bias.clone(), residual=residual.contiguous())
    assert torch.equal(ops.linear(x, weight, bias, residual=residual), dense)


def test_a_gradient_of_stride_zero(level):
    leaves = [t.requires_grad_() for t in make(9, 20, 35).values()]
    y = ops.linear(*leaves[:3], activation="gelu", residual=leaves[3])
    expanded = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    assert all(map(torch.equal, expanded, torch.autograd.grad(y, leaves, torch.ones(9, 35))))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_only_wanted_gradients(wanted, activation):
    inputs = make(9, 20, 35)
    op = with_activation(ops, activation)
    alone = {n: t.clone().requires_grad_(n == wanted) for n, t in inputs.items()}
    together = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    op(**alone).square().sum().backward()
    op(**together).square().sum().backward()
    assert torch.equal(alone[wanted].grad, together[wanted].grad)
    assert all(t.grad is None for n, t in alone.items() if n != wanted)


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_of_any_layout(shape, a_transposed, b_transposed, dtype, level):
    M, K, N = shape
    a = torch.randn(K, M, dtype=dtype).t() if a_transposed else torch.randn(M, K, dtype=dtype)
    b = torch.randn(N, K, dtype=dtype).t() if b_transposed else torch.randn(K, N, dtype=dtype)
    truth = a.double() @ b.double()
    assert_accurate("product", matmul(a, b), truth, a @ b)
    out = torch.randn(M, N)
    before = out.clone()
    matmul(a, b, out, accumulate=True)
    assert_accurate("sum", out, before + truth, before + (a.float() @ b.float()))
    wide = torch.full((M, N + 3), 7.0, dtype=dtype)
    matmul(a, b, wide[:, 1:N + 1])
    assert torch.equal(wide[:, 1:N + 1], matmul(a, b)) and (wide[:, [0, N + 1, N + 2]] == 7).all()


def test_a_product_of_general_strides(dtype, level):
    a, b = torch.randn(50, 66, dtype=dtype)[::2, ::3], torch.randn(44, 140, dtype=dtype)[::2, ::2]
    assert torch.equal(matmul(a, b), matmul(a.contiguous(), b.contiguous()))
    ones = torch.ones(1, 1, dtype=dtype).expand(25, 22)
    assert torch.equal(matmul(ones, b), matmul(ones.contiguous(), b.contiguous()))


@pytest.fixture
def on_threads():
    before = extension.get_num_threads()
    yield extension.set_num_threads
    extension.set_num_threads(before)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_rows_have_the_same_bits_in_any_batch(activation, dtype, level):
    inputs = make(301, 800, 75, dtype)
    op = with_activation(ops, activation)
    whole = op(**inputs)
    for begin, end in [(0, 1), (77, 78), (3, 5), (100, 103), (9, 17), (150, 183), (300, 301), (11, 250)]:
        rows = {n: t[begin:end] if n in ("x", "residual") else t for n, t in inputs.items()}
        assert torch.equal(op(**rows), whole[begin:end]), (begin, end)
    for columns in (slice(0, 1), slice(5, 70), slice(74, 75)):
        part = ops.linear(inputs["x"], inputs["weight"][columns], inputs["bias"][columns], activation=activation,
                          residual=inputs["residual"][:, columns])
        assert torch.equal(part, whole[:, columns]), columns


def test_same_bits_on_any_number_of_threads(on_threads, dtype, level):
    inputs, dy = make(301, 800, 130, dtype), torch.randn(301, 130, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        on_threads(count)
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        y = ops.linear(**leaves, activation="gelu")
        results.append((y, *torch.autograd.grad(y, leaves.values(), dy)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nan_and_infinity_stay_in_their_row(level):
    x, weight = torch.randn(20, 30), torch.randn(18, 30)
    clean = ops.linear(x, weight, activation="relu")
    x[3, 4], x[11, 29] = float("nan"), float("inf")
    y = ops.linear(x, weight, activation="relu")
    assert y[3].isnan().all() and not y[11].isfinite().all()
    others = [i for i in range(20) if i not in (3, 11)]
    assert torch.equal(y[others], clean[others])


def test_autocast(level):
    x, weight, bias = torch.randn(5, 40), torch.randn(24, 40, requires_grad=True), torch.randn(24)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, weight, bias)
    assert torch.equal(y, ops.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


def test_bfloat16_by_torchs_product(monkeypatch):
    monkeypatch.setattr(LINEAR, "HAS_BF16", True)
    assert LINEAR.bfloat16_product()[0] == "torch"
    for activation in ops.ACTIVATIONS:
        check_op(with_activation(ops, activation), make(9, 20, 35, torch.bfloat16), with_activation(reference, activation))


@pytest.mark.parametrize("activation", ["", "gelu", "relu"])
def test_defined_ops_keep_their_contract(activation):
    x, weight, bias, residual = make(4, 6, 5).values()
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(torch.ops.fastgpt.linear.default, (*leaves, activation, activation != ""))
    pre = torch.randn(4, 5) if activation else torch.empty(0)
    torch.library.opcheck(torch.ops.fastgpt.linear_backward.default,
                          (torch.randn(4, 5), x.detach(), weight.detach(), pre, activation, [True, False, True]))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compiled_with_backward(activation):
    op = partial(with_activation(ops, activation), **make(4, 6, 5))
    results = []
    for function in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        weight = make(4, 6, 5)["weight"].fill_(0.3).requires_grad_()
        y = function(weight=weight)
        results.append((y, torch.autograd.grad(y.square().sum(), weight)[0]))
    assert all(map(torch.equal, *results))


def test_wrong_arguments_are_named():
    x, weight = torch.randn(3, 4), torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"linear: x must have K = 6 .* in its last dimension, got \(3, 4\)"):
        ops.linear(x, weight)
    with pytest.raises(ValueError, match="linear: activation must be one of .*, got 'silu'"):
        ops.linear(x, torch.randn(5, 4), activation="silu")
