import pytest
import torch
from numerics import check_op

from fastgpt import ops, reference

SHAPES = [(1, 1), (3, 7), (2, 5, 16), (33, 59), (4, 9, 768), (257, 111), (0, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
def test_values_and_gradients(op, shape, bias, dtype, level):
    C = shape[-1]
    inputs = {"x": torch.randn(shape, dtype=dtype), "residual": torch.randn(shape, dtype=dtype),
              "weight": torch.randn(C, dtype=dtype), "bias": torch.randn(C, dtype=dtype) if bias else None}
    if op == "layer_norm":
        del inputs["residual"]
    with ops.backend("cpp"):
        check_op(getattr(ops, op), inputs, getattr(reference, op))


def test_rows_with_a_large_mean(dtype, level):
    inputs = {"x": torch.randn(8, 768, dtype=dtype) + 1000, "weight": torch.randn(768, dtype=dtype)}
    check_op(ops.layer_norm, inputs, reference.layer_norm)


def test_strided_input(level):
    x, weight, bias = torch.randn(7, 24, 5).transpose(1, 2), torch.randn(48)[::2], torch.randn(48)[1::2]
    assert torch.equal(ops.layer_norm(x, weight, bias), ops.layer_norm(x.clone(), weight.clone(), bias.clone()))
    check_op(ops.layer_norm, {"x": x, "weight": weight, "bias": bias}, reference.layer_norm)


def test_float32_weights_with_bfloat16_x(level):
    x, residual = torch.randn(5, 40).bfloat16(), torch.randn(5, 40).bfloat16()
    weight, bias = torch.randn(40), torch.randn(40)
    y, total = ops.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    truth = reference.layer_norm(total.double(), weight.double(), bias.double())
    assert torch.equal(y, truth.bfloat16())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_on_any_number_of_threads(threads, level):
    from fastgpt.cpu import extension
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


def test_a_wrong_weight_is_named():
    with pytest.raises(ValueError, match=r"layer_norm: weight must have shape \(8,\), got \(7,\)"):
        ops.layer_norm(torch.randn(2, 8), torch.randn(7))
