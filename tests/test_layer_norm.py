from functools import partial

import pytest
import torch
from numerics import check_compiled, check_op

from fastgpt import extension, ops, reference

SHAPES = [(1, 1), (3, 7), (2, 5, 16), (33, 59), (4, 9, 768), (257, 111), (5, 5000), (0, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_values_and_gradients(op, shape, bias, dtype, implementation):
    C = shape[-1]
    inputs = {"x": torch.randn(shape, dtype=dtype), "residual": torch.randn(shape, dtype=dtype),
              "weight": torch.randn(C, dtype=dtype), "bias": torch.randn(C, dtype=dtype) if bias else None}
    if op == "layer_norm":
        del inputs["residual"]
    check_op(getattr(ops, op), inputs, getattr(reference, op))


@pytest.mark.parametrize("shape", [(3, 7), (2, 9, 768)], ids=str)
@pytest.mark.parametrize("seed, dropout_p", [(0, 0.1), (2 ** 63 - 2, 0.6)], ids=str)
def test_dropout_before_the_residual_add(seed, dropout_p, shape, dtype, implementation):
    C = shape[-1]
    inputs = {"x": torch.randn(shape, dtype=dtype), "residual": torch.randn(shape, dtype=dtype),
              "weight": torch.randn(C, dtype=dtype), "bias": torch.randn(C, dtype=dtype)}
    ours, truth = (partial(module.add_layer_norm, dropout_p=dropout_p, seed=seed) for module in (ops, reference))
    check_op(ours, inputs, truth)


def test_the_dropout_mask_is_the_references(implementation):
    x, residual = torch.ones(40, 33), torch.zeros(40, 33)
    _, total = ops.add_layer_norm(x, residual, torch.ones(33), dropout_p=0.3, seed=2 ** 40 + 5)
    keep = reference.dropout_keep_mask(2 ** 40 + 5, 0.3, 1, 1, 40, 33)[0, 0]
    assert torch.equal(total > 0, keep) and 0.65 < keep.float().mean() < 0.75


def test_dropout_draws_a_seed_and_gradients_of_the_sum_alone_pass_it(implementation):
    x, residual = torch.randn(5, 24, requires_grad=True), torch.randn(5, 24, requires_grad=True)
    torch.manual_seed(3)
    (_, first), (_, second) = (ops.add_layer_norm(x, residual, torch.ones(24), dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, ops.add_layer_norm(x, residual, torch.ones(24), dropout_p=0.5)[1])
    assert not torch.equal(first, second)
    dx, dresidual = torch.autograd.grad(first.sum(), (x, residual))
    assert torch.equal(dresidual, torch.ones(5, 24))
    assert torch.allclose(dx * x, first - residual, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 768), (2, 20000)], ids=str)
def test_rows_with_a_large_mean(shape, dtype, implementation):
    inputs = {"x": torch.randn(shape, dtype=dtype) + 1000, "weight": torch.randn(shape[1], dtype=dtype)}
    check_op(ops.layer_norm, inputs, reference.layer_norm)


def test_strided_input(implementation):
    x, weight, bias = torch.randn(7, 24, 5).transpose(1, 2), torch.randn(48)[::2], torch.randn(48)[1::2]
    assert torch.equal(ops.layer_norm(x, weight, bias), ops.layer_norm(x.clone(), weight.clone(), bias.clone()))
    check_op(ops.layer_norm, {"x": x, "weight": weight, "bias": bias}, reference.layer_norm)


def test_float32_weights_with_bfloat16_x(implementation):
    x, residual = torch.randn(5, 40).bfloat16(), torch.randn(5, 40).bfloat16()
    weight, bias = torch.randn(40), torch.randn(40)
    y, total = ops.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    truth = reference.layer_norm(total.double(), weight.double(), bias.double())
    assert torch.equal(y, truth.bfloat16())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_on_any_number_of_threads(threads, level):
    x, weight = torch.randn(301, 96), torch.randn(96, requires_grad=True)
    before = extension.get_num_threads()
    results = []
    for count in (1, threads):
        extension.set_num_threads(count)
        y = ops.layer_norm(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), weight)))
    extension.set_num_threads(before)
    for one, other in zip(*results):
        assert torch.equal(one, other)


def _add_norm_and_gradient(x, residual, weight, dy):
    x = x.detach().requires_grad_()
    y, total = ops.add_layer_norm(x, residual, weight)
    return y, total, torch.autograd.grad((y, total), x, (dy, dy))[0]


def test_a_row_does_not_depend_on_the_others(dtype, implementation):
    x, residual, dy = (torch.randn(23, 59, dtype=dtype) for _ in range(3))
    weight = torch.randn(59, dtype=dtype)
    whole = _add_norm_and_gradient(x, residual, weight, dy)
    for rows in (slice(0, 1), slice(7, 9), slice(10, 23)):
        part = _add_norm_and_gradient(x[rows], residual[rows], weight, dy[rows])
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part))


def test_results_that_are_streamed_past_the_caches(dtype, level):
    rows = 2 ** 13 if dtype == torch.bfloat16 else 2 ** 12  # 6 MB and more of them
    x, residual, dy = torch.randn(3, rows, 384, dtype=dtype)
    weight = torch.randn(384, dtype=dtype)
    whole = _add_norm_and_gradient(x, residual, weight, dy)
    part = _add_norm_and_gradient(x[-9:], residual[-9:], weight, dy[-9:])
    assert all(torch.equal(a[-9:], b) for a, b in zip(whole, part))


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", None), ("bfloat16", "float32", "bfloat16"),
                                    ("bfloat16", "bfloat16", "float32"), ("float32", "bfloat16", "float32")], ids=str)
def test_any_mixture_of_dtypes(dtypes, implementation):
    x_dtype, weight_dtype, bias_dtype = (getattr(torch, d) if d else None for d in dtypes)
    x, weight = torch.randn(5, 40).to(x_dtype), torch.randn(40).to(weight_dtype).requires_grad_()
    bias = torch.randn(40).to(bias_dtype).requires_grad_() if bias_dtype else None
    wide = [None if t is None else t.detach().float().requires_grad_() for t in (weight, bias)]
    y, expected = ops.layer_norm(x, weight, bias), ops.layer_norm(x, *wide)
    assert torch.equal(y, expected) and y.dtype == x_dtype
    for leaf, wide_leaf in zip((weight, bias), wide):
        if leaf is not None:
            gradient, = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
            assert torch.equal(gradient, torch.autograd.grad(expected.sum(), wide_leaf, retain_graph=True)[0].to(leaf.dtype))


@pytest.mark.parametrize("bias", [None, torch.randn(8)], ids=["no bias", "bias"])
def test_library_ops(bias, dtype):
    x, residual = (torch.randn(3, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(8, requires_grad=True), None if bias is None else bias.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastgpt.layer_norm.default, (x, weight, bias, 1e-5))
    for seed, dropout_p in ((None, 0.0), (torch.tensor(5), 0.25)):
        torch.library.opcheck(torch.ops.fastgpt.add_layer_norm.default,
                              (x, residual, weight, bias, seed, 1e-5, dropout_p))


def test_compiled_with_backward():
    def block(x, residual, weight, bias):
        y, total = ops.add_layer_norm(x, residual, weight, bias)
        return (ops.layer_norm(y, weight) + total).square().sum()
    leaves = [torch.randn(s, requires_grad=True) for s in ((6, 40), (6, 40), (40,), (40,))]
    check_compiled(block, leaves)


def test_a_bfloat16_branch_beside_a_float32_residual_stream(level):
    x, residual, weight = torch.randn(5, 40).bfloat16(), torch.randn(5, 40), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        y, total = ops.add_layer_norm(x, residual, weight)
    assert torch.equal(total, x + residual) and torch.equal(y, ops.layer_norm(total, weight))


def test_a_wrong_weight_is_named():
    with pytest.raises(ValueError, match=r"layer_norm: weight must have shape \(8,\), got \(7,\)"):
        ops.layer_norm(torch.randn(2, 8), torch.randn(7))
