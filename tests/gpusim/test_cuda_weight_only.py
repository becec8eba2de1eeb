"""The product with weights of 8 or 4 bits, simulated and with -m gpu on one: both formats and dtypes, odd sizes."""
import itertools

import cuda_shim
import nvcc
import pytest
import torch
from cuda_machine import running_machine_code
from numerics import assert_accurate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import reference
from fastgpt.cuda import weight_only
from fastgpt.cuda.weight_only import MOST_TOKENS, pack, weight_only_linear
from fastgpt.engine import gpu_runner

pytestmark = [pytest.mark.skipif(bool(cuda_shim.missing()), reason=str(cuda_shim.missing())),
              pytest.mark.usefixtures("one_thread")]

FORMATS = ["int8", "int4"]
ARCHS = [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 90))]
DTYPES = [torch.float16, torch.bfloat16]
# (N, K): less than a tile, more, not a multiple of 8, two turns for some of a block's warps (18 and 9 tiles), three for all.
SIZES = [(1, 8), (17, 40), (33, 129), (16, 100), (20, 1100), (130, 320), (20, 3072)]
ROWS = [1, 2, 8, 9, 16, 19]
EPILOGUES = [(False, None, False), (True, "gelu", False), (True, "gelu_tanh", True), (False, "relu", True)]


def weights(format, N, K, bias=False):
    return pack(torch.randn(N, K) * 0.1, format, torch.randn(N) if bias else None)


def in_torch(x, packed, activation=None, residual=None, dtype=None):
    """The same in PyTorch, in dtype or x's."""
    dtype = dtype or x.dtype
    x, residual, bias = (None if t is None else t.to(dtype) for t in (x, residual, packed.bias))
    return reference.linear(x, packed.dequantised(dtype), bias, activation=activation, residual=residual)


def check(x, packed, activation=None, residual=None):
    y = weight_only_linear(x, packed, activation, residual)
    truth = in_torch(x, packed, activation, residual, torch.float64)
    name = f"{len(x)} rows of {packed.format} {packed.N} x {packed.K}"
    assert_accurate(name, y, truth, in_torch(x, packed, activation, residual))
    return y


@pytest.mark.parametrize("cuda", [{"order": "fifo"}, {"order": "rand:2"}, pytest.param("gpu", marks=pytest.mark.gpu)],
                         indirect=True, ids=["fifo", "rand", "gpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_reference(cuda, format, dtype):
    epilogues = itertools.cycle(EPILOGUES)
    for (N, K), M in itertools.product(SIZES, ROWS):
        bias, activation, residual = next(epilogues)
        check(torch.randn(M, K).to(dtype), weights(format, N, K, bias), activation,
              torch.randn(M, N).to(dtype) if residual else None)


@pytest.mark.skipif(bool(nvcc.MISSING), reason=str(nvcc.MISSING))
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch):
    with running_machine_code(arch):
        for format, dtype, M in itertools.product(FORMATS, DTYPES if arch >= 80 else DTYPES[:1], (2, 9)):
            x, residual = torch.randn(M, 200).to(dtype), torch.randn(M, 20).to(dtype)
            check(x, weights(format, 20, 200, True), "gelu" if M == 2 else "gelu_tanh", residual)
        packed = weights("int4", 20, 1100)
        nine = torch.randn(9, 1100).half()
        for activation in ("gelu", "gelu_tanh"):
            assert torch.equal(check(nine, packed, activation)[8], check(nine[8:], packed, activation)[0])


@pytest.mark.parametrize("activation, bias, residual", list(itertools.product(
    weight_only.ACTIVATIONS, [False, True], [False, True])))
def test_every_epilogue(cuda, activation, bias, residual):
    x = torch.randn(3, 64).half() * 4
    check(x, weights("int8", 24, 64, bias), activation, torch.randn(3, 24).half() if residual else None)


@pytest.mark.parametrize("format, K", [("int8", 1100), ("int4", 1100), ("int4", 264)])
def test_a_row_has_the_same_bits_in_every_batch(cuda, format, K):
    packed, x = weights(format, 20, K, True), torch.randn(MOST_TOKENS, K).bfloat16()
    alone = [weight_only_linear(row[None], packed, "gelu")[0] for row in x[:16]]
    for M in (2, 8, 9, 16, 17, MOST_TOKENS):
        y = weight_only_linear(x[:M], packed, "gelu")
        assert all(map(torch.equal, y, alone)), M
    mixed = torch.full((16, K), float("nan")).bfloat16()
    mixed[13] = x[4]
    y = weight_only_linear(mixed, packed, "gelu")
    assert torch.equal(y[13], alone[4])
    assert y.isnan().any(1).sum() == 15


@pytest.mark.parametrize("format, least", [("int8", -127), ("int4", -8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_exact_at_every_place(cuda, format, least, dtype):
    """A row's largest magnitude is -least, so that its scale is 1; a token is 1 at one place and 0 elsewhere."""
    K = 256
    numbers = torch.arange(least, -least if format == "int4" else -least + 1, dtype=torch.float32)
    weight = numbers[(torch.arange(48)[:, None] * 7 + torch.arange(K)) % len(numbers)]
    weight[:, ::32] = least
    packed = pack(weight, format)
    for places in torch.arange(K).view(-1, 16):
        assert torch.equal(weight_only_linear(torch.eye(K)[places].to(dtype), packed).float(), weight[:, places].t())


def test_steps_through_views(cuda):
    """Rows apart, at an odd address, or with a step between their numbers; beside them lies NaN."""
    packed, around = weights("int8", 24, 40), torch.full((9, 100), float("nan")).half()
    for part in (around[:, 8:48], around[:, 3:43], around[:, :80:2], around[::2, 16:56]):
        part.copy_(torch.randn(part.shape))
        check(part, packed)
        part.fill_(float("nan"))
    check(torch.randn(40, 9).half().t(), packed)
    check(torch.randn(9 * 40 + 3).half()[3:].view(9, 40), packed)
    wide = torch.randn(9, 80).half()
    x = torch.randn(9, 40).half()
    check(x, packed, residual=wide[:, 30:54])
    check(x, packed, residual=wide[:, 1:49:2])


def test_many_rows_go_through_numbers_made_of_the_weights(cuda):
    for format in FORMATS:
        packed, x = weights(format, 24, 100, True), torch.randn(MOST_TOKENS + 1, 100).bfloat16()
        check(x, packed, "relu", torch.randn(len(x), 24).bfloat16())
    assert weight_only_linear(x[:0], packed).shape == (0, 24)


class MovedBytes(TorchDispatchMode):
    """Counts what PyTorch's ops read and write, views aside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        read, written = ([x for x in tree_leaves(of) if isinstance(x, torch.Tensor)] for of in ((args, kwargs), result))
        places = {x.untyped_storage().data_ptr() for x in read}
        if not any(x.untyped_storage().data_ptr() in places for x in written):
            self.count += sum(x.nbytes for x in (*read, *written))
        return result


@pytest.mark.parametrize(("format", "moved"), [("int8", 33), ("int4", 37)])
def test_how_many_tokens_the_kernel_is_the_cheaper_way_for(format, moved):
    """By bytes, as fastgpt/cuda/weight_only.py says; the graphs' batches are among them."""
    packed, x = weights(format, 512, 512), torch.randn(16, 512).bfloat16()
    with MovedBytes() as many:
        weight_only._many(x, packed, None, None)
    assert many.count / 512 ** 2 == pytest.approx(moved, abs=0.5)
    tokens, of_l2 = 16, 1.6
    of_pass = (packed.data.nbytes + packed.scales.nbytes * (format == "int4")) / 512 ** 2 + 2 * tokens / weight_only.OUTPUTS
    assert of_pass == {"int8": 3.0, "int4": 2.5625}[format]
    assert MOST_TOKENS / tokens * of_pass / of_l2 < moved and gpu_runner.LADDER[-1] <= MOST_TOKENS


def test_packed_weights_are_near_the_weights():
    weight = torch.randn(70, 100) * torch.rand(70, 1)
    error = (pack(weight, "int8").dequantised(torch.float64) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True).double() / 127 * 0.5001).all()
    # Of the scale that maps a group's largest number to -8 alone.
    groups = torch.nn.functional.pad(weight, (0, 28)).view(70, 4, 32)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    plain = (groups / (extreme / -8)).round().clamp(-8, 7) * (extreme / -8)
    error = (pack(weight, "int4").dequantised(torch.float64) - weight).square().sum()
    assert error < 0.95 * (plain - groups).square().sum()


@pytest.mark.parametrize("format", FORMATS)
def test_packing_in_parts_and_odd_weights(format, monkeypatch):
    weight = torch.randn(21, 70)
    weight[3] = 0
    weight[4, :32] = -0.0
    weight[5] *= 1e-30
    weight[6] = weight[6].abs()
    whole = pack(weight.t().contiguous().t(), format)
    monkeypatch.setattr(weight_only, "ROWS_AT_A_TIME", 4)
    parts = pack(weight, format)
    assert torch.equal(whole.data, parts.data) and torch.equal(whole.scales, parts.scales)
    numbers = parts.dequantised(torch.float32)
    assert numbers.isfinite().all() and not numbers[3].any()
    assert ((numbers - weight).double().norm(dim=1) <= 0.11 * weight.double().norm(dim=1)).all()
    assert torch.equal(pack(weight.half(), format).data, pack(weight.half().float(), format).data)


def test_launch_rule(cuda):
    for bits, K in itertools.product((8, 4), (8, 64, 65, 128, 768, 1024, 1100, 3072, 50000)):
        tiles, most = -(-K // weight_only.DEPTH[f"int{bits}"]), {8: 16, 4: 8}[bits]
        warps = cuda.library.weight_only_warps(bits, K)
        turns = -(-tiles // most)
        assert 1 <= warps <= most and warps * turns >= tiles > warps * (turns - 1), (bits, K)


@pytest.mark.parametrize("cuda", [{}], indirect=True, ids=["simulated"])
def test_an_error_of_the_launch_names_it(cuda):
    cuda.library.fail_next_launch("no such device")
    with pytest.raises(RuntimeError, match=r"weight_only_linear\(bits=8, M=1, N=4, K=8\): no such device"):
        weight_only_linear(torch.zeros(1, 8).half(), weights("int8", 4, 8))


X = torch.zeros(2, 40).half()
BAD = [({"x": torch.zeros(2, 39).half()}, r"x must have shape \(M, 40\) for weights \(24, 40\), got \(2, 39\)"),
       ({"x": torch.zeros(40).half()}, r"got \(40,\)"),
       ({"x": torch.zeros(2, 40)}, "float16 or bfloat16, got torch.float32"),
       ({"x": X, "activation": "silu"}, "activation must be one of"),
       ({"x": X, "residual": torch.zeros(2, 23).half()}, r"must be torch.float16 of shape \(2, 24\), got .* \(2, 23\)"),
       ({"x": X, "residual": torch.zeros(2, 24)}, "got torch.float32"),
       ({"x": X.to("meta")}, "the weights are on cpu, x on meta")]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        weight_only_linear(weight=weights("int8", 24, 40), **arguments)


@pytest.mark.parametrize("weight, format, bias, message", [
    (torch.zeros(3, 8), "int5", None, "format must be one of 'int8', 'int4', got 'int5'"),
    (torch.zeros(8), "int8", None, r"got \(8,\)"),
    (torch.zeros(3, 0), "int8", None, r"got \(3, 0\)"),
    (torch.zeros(3, 8), "int4", torch.zeros(4), r"bias must have shape \(3,\), got \(4,\)"),
    (torch.full((3, 8), float("inf")), "int8", None, r"the weight \(3, 8\) has entries that are not finite"),
    (torch.full((3, 8), float("nan")), "int4", None, "not finite")])
def test_what_cannot_be_packed_is_named(weight, format, bias, message):
    with pytest.raises(ValueError, match=message):
        pack(weight, format, bias)


def test_bfloat16_is_refused_where_there_are_no_products_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    on_gpu = weight_only._has_bfloat16.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(weight_only, "_has_bfloat16", lambda device: on_gpu)
    with pytest.raises(ValueError, match="no tensor cores for bfloat16"):
        weight_only_linear(torch.zeros(1, 8).bfloat16(), weights("int8", 4, 8))
