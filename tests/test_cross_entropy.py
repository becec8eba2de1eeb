import math
import sys
from dataclasses import replace

import pytest
import torch
from numerics import check_compiled, check_op
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import extension, ops, reference
from fastgpt.autograd import cross_entropy as shared

MODULE = sys.modules["fastgpt.cpu.cross_entropy"]
REDUCTIONS = ["mean", "sum", "none"]
# (rows..., K, V)
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 5, 16, 33), (150, 24, 129), (5, 0, 7), (0, 8, 9)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 rows or fewer, so that few rows make several."""
    for name in ("OUR_PRODUCTS", "TORCH_PRODUCTS"):
        monkeypatch.setattr(MODULE, name, replace(getattr(MODULE, name), chunk_bytes=1))
    if "fastgpt.kernels.cross_entropy" in sys.modules:
        monkeypatch.setattr(sys.modules["fastgpt.kernels.cross_entropy"], "CROSS_ENTROPY_CHUNK", 1)


def make_inputs(*rows, K, V, dtype=torch.float32, bias=False):
    """x, weight, bias and targets, a fifth of these ignored. The logits are the same in any order of summation."""
    targets = torch.randint(V, rows)
    targets[torch.rand(rows) < 0.2] = -100
    x, weight = (torch.randint(-8, 9, shape).to(dtype) / 4 for shape in ((*rows, K), (V, K)))
    return {"x": x, "weight": weight, "bias": torch.randn(V, dtype=dtype) if bias else None}, targets


def both(targets, **options):
    def of(module):
        return lambda x, weight, bias: module.cross_entropy(x, weight, targets, bias=bias, **options)
    return of(ops), of(reference)


def loss_and_gradients(x, weight, bias, targets, gradient=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    loss = ops.cross_entropy(*leaves[:2], targets, bias=leaves[2] if bias is not None else None, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_and_gradients(reduction, bias, shape, dtype, implementation, small_chunks):
    *rows, K, V = shape
    inputs, targets = make_inputs(*rows, K=K, V=V, dtype=dtype, bias=bias)
    targets.flatten()[:1] = 0
    if reduction == "mean" and not targets.numel():
        assert ops.cross_entropy(inputs["x"], inputs["weight"], targets).isnan()
        return
    ours, truth = both(targets, reduction=reduction)
    check_op(ours, inputs, truth)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.9, "z_loss": 1e-4}],
                         ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_label_smoothing_and_z_loss(reduction, options, dtype, implementation, small_chunks):
    inputs, targets = make_inputs(70, K=24, V=129, dtype=dtype, bias=True)
    ours, truth = both(targets, reduction=reduction, **options)
    check_op(ours, inputs, truth)


def test_a_scaled_loss_keeps_small_gradients(dtype, implementation):
    """1 / (V rows) is below what float16 has digits for: a gradient scaler's factor must come before the rounding."""
    inputs, targets = make_inputs(300, K=8, V=1000, dtype=dtype)
    inputs["x"] /= 16
    ours, truth = both(targets)
    check_op(lambda *tensors: 65536 * ours(*tensors), inputs, lambda *tensors: 65536 * truth(*tensors))
    inputs, targets = make_inputs(1, K=8, V=10, dtype=dtype)
    targets[:] = 3
    x = inputs["x"].requires_grad_()
    scaled, = torch.autograd.grad(70000 * ops.cross_entropy(x, inputs["weight"] / 256, targets), x)
    assert scaled.isfinite().all()  # though the factor is infinite in float16


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_products_by_torch(reduction, bias, small_chunks, monkeypatch):
    monkeypatch.setattr(MODULE, "bfloat16_product", lambda: ("torch", ""))
    for rows in (40, 150):  # one chunk, three
        inputs, targets = make_inputs(rows, K=24, V=129, dtype=torch.bfloat16, bias=bias)
        ours, truth = both(targets, reduction=reduction)
        check_op(ours, inputs, truth)


@pytest.mark.parametrize("ignored", [-1, 3, 1000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_targets(reduction, ignored, implementation):
    inputs, targets = make_inputs(20, K=8, V=10)
    targets[targets == -100] = ignored
    ours, truth = both(targets, ignore_index=ignored, reduction=reduction)
    check_op(ours, inputs, truth)


def test_all_ignored(dtype, implementation):
    inputs, targets = make_inputs(5, K=8, V=10, dtype=dtype, bias=True)
    targets[:] = -100
    loss, *gradients = loss_and_gradients(*inputs.values(), targets)
    assert loss.isnan() and not any(g.any() for g in gradients)
    assert loss_and_gradients(*inputs.values(), targets, reduction="sum")[0] == 0
    assert not ops.cross_entropy(inputs["x"], inputs["weight"], targets, reduction="none").any()


def test_extreme_logits(level):
    x, targets = torch.tensor([[1.0], [1e4], [math.nan], [-1e4], [1.0]]), torch.tensor([0, 1, 2, 3, 4])
    weight, bias = torch.tensor([[-3e4], [2e4], [0.0], [1e4], [5.0]]), torch.tensor([0.0, 1.0, -math.inf, 0.0, -math.inf])
    expected = reference.cross_entropy(x, weight, targets, bias=bias, reduction="none")
    torch.testing.assert_close(ops.cross_entropy(x, weight, targets, bias=bias, reduction="none"), expected, equal_nan=True)
    _, dx, dweight, dbias = loss_and_gradients(x[:2], weight, bias, targets[:2])
    assert dx.isfinite().all() and dweight.isfinite().all() and dbias[2] == dbias[4] == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_does_not_depend_on_the_chunks(reduction, dtype, level, monkeypatch):
    inputs, targets = make_inputs(200, K=24, V=129, dtype=dtype)
    whole = loss_and_gradients(*inputs.values(), targets, torch.tensor(1.0).expand(200 if reduction == "none" else ()),
                               reduction=reduction)
    monkeypatch.setattr(MODULE, "OUR_PRODUCTS", replace(MODULE.OUR_PRODUCTS, chunk_bytes=1))
    for rows in (1, 7, 64):
        monkeypatch.setattr(shared, "MIN_ROWS", rows)
        loss, dx, _ = loss_and_gradients(*inputs.values(), targets, torch.ones_like(whole[0]), reduction=reduction)
        assert torch.equal(loss, whole[0]) and torch.equal(dx, whole[1])


def test_a_row_does_not_depend_on_the_others(dtype, implementation):
    inputs, targets = make_inputs(150, K=24, V=129, dtype=dtype)
    x, weight, _ = inputs.values()
    whole = ops.cross_entropy(x, weight, targets, reduction="none")
    for rows in (slice(0, 1), slice(31, 40)):
        assert torch.equal(ops.cross_entropy(x[rows], weight, targets[rows], reduction="none"), whole[rows])


def test_same_bits_on_any_number_of_threads(level, small_chunks):
    inputs, targets = make_inputs(150, K=48, V=700, bias=True)
    before, results = extension.get_num_threads(), []
    for count in (1, 2, 3):
        extension.set_num_threads(count)
        results.append(loss_and_gradients(*inputs.values(), targets))
    extension.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_only_the_gradients_that_are_needed(frozen, reduction):
    leaves, targets = make_inputs(12, K=8, V=10, bias=True)
    leaves = {n: t.requires_grad_(n != frozen) for n, t in leaves.items()}
    loss = ops.cross_entropy(leaves["x"], leaves["weight"], targets, bias=leaves["bias"], reduction=reduction)
    loss.sum().backward()
    everything = loss_and_gradients(*leaves.values(), targets, torch.ones_like(loss), reduction=reduction)[1:]
    for (name, leaf), gradient in zip(leaves.items(), everything):
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, gradient)


def test_gradients_are_scaled_and_may_be_asked_for_twice():
    x, weight = torch.randn(12, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    loss = ops.cross_entropy(x, weight, torch.arange(12) % 10)
    once, = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = once.clone()
    thrice, = torch.autograd.grad(3 * loss, weight, retain_graph=True)
    torch.testing.assert_close(thrice, 3 * kept)
    loss.backward()
    weight.grad.zero_()
    assert torch.equal(once, kept)


class Allocations(TorchDispatchMode):
    """Records how many elements the largest new tensor has that any op made."""
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not any(r.alias_info for r in function._schema.returns):  # not a view, nor a result in place
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_are_never_whole_in_memory(reduction, small_chunks):
    N, K, V = 1000, 4, 500
    x, weight = torch.randn(N, K, requires_grad=True), torch.randn(V, K, requires_grad=True)
    targets = torch.randint(V, (N,))
    with Allocations() as seen:
        ops.cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
    assert seen.largest == 63 * V  # 1000 rows in 16 chunks
    with Allocations() as seen:
        reference.cross_entropy(x, weight, targets, reduction=reduction)
    assert seen.largest == N * V


def test_no_gradients_in_inference(small_chunks):
    x, weight = torch.randn(4, 80, requires_grad=True), torch.randn(100, 80, requires_grad=True)
    with torch.no_grad(), Allocations() as seen:
        loss = ops.cross_entropy(x, weight, torch.arange(4))
    assert not loss.requires_grad and seen.largest == 4 * 100


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_library_ops(bias, dtype):
    inputs, targets = make_inputs(6, K=8, V=10, dtype=dtype, bias=bias)
    arguments = *(None if t is None else t.requires_grad_() for t in inputs.values()), targets, -100, 0.1, 1e-3
    torch.library.opcheck(torch.ops.fastgpt.cross_entropy.default, (*arguments, True, [True, True, bias]))
    torch.library.opcheck(torch.ops.fastgpt.cross_entropy_rows.default, arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_with_backward(reduction):
    inputs, targets = make_inputs(6, K=8, V=10, bias=True)
    leaves = [t.requires_grad_() for t in inputs.values()]

    def scaled_loss(x, weight, bias):
        return 2 * ops.cross_entropy(x, weight, targets, bias=bias, reduction=reduction).sum()
    check_compiled(scaled_loss, leaves)


def test_autocast(implementation):
    inputs, targets = make_inputs(6, K=8, V=10, bias=True)
    half = [t.bfloat16() for t in inputs.values()]
    with torch.autocast("cpu", torch.bfloat16):
        loss, *gradients = loss_and_gradients(*inputs.values(), targets)
    expected, *rounded = loss_and_gradients(*half, targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert all(g.dtype == torch.float32 and torch.equal(g, r.float()) for g, r in zip(gradients, rounded))


def test_strided_input(level):
    x, weight, targets = torch.randn(9, 12).t(), torch.randn(20, 18)[:, ::2], torch.arange(24).clamp(max=19)[::2]
    leaves = x.requires_grad_(), weight.requires_grad_()
    loss = ops.cross_entropy(*leaves, targets)
    expected = loss_and_gradients(x.contiguous(), weight.contiguous(), None, targets.contiguous())
    assert all(map(torch.equal, (loss, *torch.autograd.grad(loss, leaves)), expected))


@pytest.mark.parametrize("wrong", [-1, 10, 2 ** 40, -2 ** 63])
def test_an_id_outside_the_vocabulary_is_named(wrong, level):
    targets = torch.randint(10, (3, 4))
    targets[1, 2] = targets[2, 3] = wrong
    for reduction in REDUCTIONS:
        with pytest.raises(IndexError, match=rf"targets\[1, 2\] is {wrong}, expected an id in \[0, 10\)"):
            ops.cross_entropy(torch.randn(3, 4, 8), torch.randn(10, 8), targets, reduction=reduction)


@pytest.mark.parametrize("change, error, message", [
    ({"targets": torch.zeros(5, dtype=torch.int32)}, ValueError, "targets must be int64"),
    ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"targets must be int64 of shape \(5,\), got .* \(4,\)"),
    ({"weight": torch.randn(10, 7)}, ValueError, "x must have K = 7"),
    ({"weight": torch.randn(10, 8).bfloat16()}, ValueError, "x is torch.float32, weight torch.bfloat16"),
    ({"bias": torch.randn(9)}, ValueError, r"bias must have shape \(10,\), got \(9,\)"),
    ({"reduction": "max"}, ValueError, "reduction must be mean, sum or none, got 'max'"),
    ({"x": torch.zeros(5, 8, dtype=torch.int64)}, TypeError, "x must have a floating dtype"),
])
def test_broken_input_is_named(change, error, message):
    arguments = {"x": torch.randn(5, 8), "weight": torch.randn(10, 8), "targets": torch.zeros(5, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        ops.cross_entropy(**(arguments | change))


def test_one_position_alone(implementation):
    x, weight, target = torch.randn(8), torch.randn(3, 8), torch.tensor(1)
    for module in (ops, reference):
        for reduction in ("mean", "none"):
            loss = module.cross_entropy(x, weight, target, reduction=reduction)
            torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(weight @ x, target))
