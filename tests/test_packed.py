"""Packed weights: every format's numbers, products of any number of rows against the weights as they are stored, and the
bits of a row whatever it is multiplied with."""
import numpy as np
import pytest
import torch
from numerics import assert_accurate

from fastgpt.engine.memory import address
from fastgpt.extension import _C

pytestmark = pytest.mark.skipif(_C is None, reason="needs the extension")
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
SHAPES = [(1, 1), (33, 7), (50, 131), (100, 768), (64, 3072), (17, 33), (50257, 5)]  # (N, K)
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 14, 16, 65)
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


class Packed:
    """A weight in a format, with a bias; `weight` is what its numbers stand for, in float64."""

    def __init__(self, fmt, weight, bias=None):
        (N, K), columns = weight.shape, _C.panel_columns()
        panels = -(-N // columns)
        self.memory = np.empty(panels * _C.panel_bytes(FORMATS[fmt], K) + 64, np.uint8)
        self.memory[:] = 0xFF  # a byte that packing forgets is a NaN or a large number
        data = address(self.memory) + -address(self.memory) % 64
        dtype = int(weight.dtype == torch.bfloat16)
        _C.pack_weight(FORMATS[fmt], dtype, weight.data_ptr(), N, K, *weight.stride(), data)
        self.bias = torch.zeros(panels * columns)
        if bias is not None:
            self.bias[:N] = bias
        self.tuple = (FORMATS[fmt], N, K, data, 0 if bias is None else self.bias.data_ptr())
        self.weight = torch.full((N, K), float("nan"))
        for n in range(N):
            _C.unpack_column(self.tuple, n, self.weight[n].data_ptr())

    def __call__(self, x, activation=None, residual=None):
        out = torch.full((len(x), self.tuple[1]), float("nan"))
        _C.packed_linear(self.tuple, x.data_ptr(), len(x), ACTIVATIONS[activation],
                         0 if residual is None else residual.data_ptr(), out.data_ptr())
        return out


def largest_integer(fmt):
    """Of a row's numbers in a format's products, 0 where they are no integers: int8 takes bytes where VNNI multiplies them."""
    return {"int8": 127 if "vnni" in _C.engine_dots() else 32767, "int4": 127}.get(fmt, 0)


def quantized_rows(x, fmt):
    """x as a format's products see it: 16-bit integers a row, 8-bit ones a group of 32, or itself."""
    x, top = x.double(), largest_integer(fmt)
    if top:
        group = 32 if top == 127 else x.shape[1]
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
        scale = padded.abs().amax(2, keepdim=True) / top
        return ((padded / scale.where(scale > 0, 1)).round() * scale).flatten(1)[:, :x.shape[1]]
    return x.bfloat16().double() if fmt == "bfloat16" and "bf16" in _C.engine_dots() else x


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_the_nearest_of_their_format(level, fmt):
    for N, K in SHAPES:
        weight = torch.randn(N, K)
        stored = Packed(fmt, weight).weight
        if fmt == "float32":
            assert torch.equal(stored, weight)
        elif fmt == "bfloat16":
            assert torch.equal(stored, weight.bfloat16().float())
        elif fmt == "int8":  # half a step, one for each column
            assert ((stored - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all()
        else:  # never worse, group by group, than steps of the largest magnitude / 7, whose scales are rounded too
            groups = torch.nn.functional.pad(weight, (0, -K % 32)).unflatten(1, (-1, 32))
            step = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().float()
            plain = (groups / step.where(step > 0, 1)).round().clamp(-8, 7) * step
            ours = torch.nn.functional.pad(stored, (0, -K % 32)).unflatten(1, (-1, 32))
            assert ((ours - groups).square().sum() <= (plain - groups).square().sum() * 1.0001)


@pytest.mark.parametrize("fmt", FORMATS)
def test_products_equal_the_reference(level, fmt):
    for N, K in SHAPES:
        weight, bias = torch.randn(N, K) * 0.1, torch.randn(N)
        packed = Packed(fmt, weight, bias)
        x = torch.randn(max(ROWS), K)
        truth = quantized_rows(x, fmt) @ packed.weight.double().T + bias.double()
        # PyTorch's own error, on what the integers stand for.
        pytorch = torch.nn.functional.linear(quantized_rows(x, fmt).float(), packed.weight, bias)
        # A tie in the rows' rounding may fall to either side: one step of one number.
        step = 1 / largest_integer(fmt) if largest_integer(fmt) else 0.0
        slack = step * x.abs().max() * packed.weight.abs().max()
        assert_close(f"{fmt} {N} x {K}", packed(x), truth, pytorch, float(slack))


def assert_close(name, actual, truth, pytorch, slack):
    if slack == 0.0:
        return assert_accurate(name, actual, truth, pytorch)
    assert actual.isfinite().all(), name
    worst = (actual.double() - truth).abs().max()
    bound = 3 * (pytorch.double() - truth).abs().max() + 4 * slack + 1e-6 * truth.abs().max()
    assert worst <= bound, f"{name}: {worst:.3e} > {bound:.3e}"


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_rows_bits_do_not_depend_on_the_others(level, fmt):
    for N, K in SHAPES:
        packed = Packed(fmt, torch.randn(N, K), torch.randn(N))
        x = torch.randn(max(ROWS), K)
        alone = torch.cat([packed(x[i:i + 1].clone(), "gelu") for i in range(len(x))])
        for M in ROWS:
            assert torch.equal(packed(x[:M].clone(), "gelu"), alone[:M]), (N, K, M)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_number_of_threads_changes_no_bit(level, fmt):
    packed, x = Packed(fmt, torch.randn(1000, 96)), torch.randn(9, 96)
    before, results = _C.threads(), []
    for threads in (1, 2, 3, 5):
        _C.set_threads(threads)
        results.append(packed(x))
    _C.set_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("fmt", FORMATS)
def test_activation_and_residual(level, fmt):
    packed, x = Packed(fmt, torch.randn(50, 40), torch.randn(50)), torch.randn(7, 40)
    plain = packed(x)
    for name, function in (("gelu", torch.nn.functional.gelu), ("relu", torch.relu),
                           ("gelu_tanh", lambda y: torch.nn.functional.gelu(y, approximate="tanh"))):
        residual = torch.randn(7, 50)
        assert torch.allclose(packed(x, name, residual), function(plain) + residual, atol=1e-6)
    assert torch.equal(packed(x, None, x.new_zeros(7, 50)), plain)


@pytest.mark.parametrize("fmt", FORMATS)
def test_transposed_and_bfloat16_sources(level, fmt):
    weight = torch.randn(45, 70).bfloat16()
    stored = Packed(fmt, weight.float()).weight
    assert torch.equal(Packed(fmt, weight).weight, stored)
    assert torch.equal(Packed(fmt, weight.float().t().contiguous().t()).weight, stored)


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_extremes_and_nan(level, fmt):
    weight = torch.randn(20, 64)
    weight[3] = 0
    weight[5, :32] = 0
    weight[7, 1] = 1e4
    packed = Packed(fmt, weight)
    assert (packed.weight[3] == 0).all()
    assert (packed.weight[5, :32] == 0).all()
    x = torch.randn(5, 64)
    x[1] = 0
    x[2, 9] = 1e6
    x[3, 0] = float("nan")
    y = packed(x)
    assert (y[1] == 0).all()
    assert y[[0, 1, 2, 4]].isfinite().all()
    assert y[3].isnan().all()


def test_a_fingerprint_changes_with_every_bit(level):
    data = torch.randn(1 << 19)
    before = _C.fingerprint(data.data_ptr(), data.nbytes)
    assert before == _C.fingerprint(data.data_ptr(), data.nbytes)
    seen = {before}
    for change in (lambda: data.neg_(), lambda: data[5:6].neg_(), lambda: data[-1:].mul_(1.0000001),
                   lambda: data.copy_(data.flip(0)), lambda: data.mul_(2)):
        change()
        seen.add(_C.fingerprint(data.data_ptr(), data.nbytes))
    assert len(seen) == 6
    assert len({_C.fingerprint(data.data_ptr(), n) for n in range(70)}) == 70
