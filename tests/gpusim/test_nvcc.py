"""The PTX machine runs what nvcc makes of CUDA C++: planted_ptx.cu, whose kernels use what Triton's never do."""
import re
import struct
from pathlib import Path

import nvcc
import pytest
import torch
from ptx_machine import Kernel, PtxError
from ptx_parser import entries
from sass_model import describe

pytestmark = pytest.mark.skipif(bool(nvcc.MISSING), reason=str(nvcc.MISSING))
SOURCE = Path(__file__).parent / "planted_ptx.cu"
ARCHS = [75, 80, 90]
WORD = 2 ** 32


def kernel(name, arch, memory=()):
    ptx = nvcc.ptx(SOURCE, arch)
    symbol = next(symbol for symbol in entries(ptx)[1] if f"{len(name)}{name}" in symbol)
    return Kernel(ptx, symbol, memory)


FUNCTIONS = [torch.exp, torch.log, torch.tanh, torch.erf, lambda x: x / 3.0, torch.sqrt, lambda x: x ** 2.5, torch.log1p,
             lambda x: x.fmod(torch.tensor(0.3).to(x)), lambda x: x.exp() / 3, torch.round]


def run_functions(number, arch, x, out, memory):
    """In blocks of 16 x 4."""
    arguments = struct.pack("QqQif", x.data_ptr(), x.numel(), out.data_ptr(), number, 0.5)
    kernel("functions", arch, memory).launch((2,), (16, 4), [arguments])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_functions_of_a_struct(number, arch):
    x, out = torch.rand(101) * 3 + 0.01, torch.full((101,), torch.nan)
    run_functions(number, arch, x, out, [x, out])
    torch.testing.assert_close(out, (FUNCTIONS[number](x.double()) * 0.5).float(), rtol=4e-7, atol=0)


def test_memory_that_a_struct_points_to():
    """What is not registered, or lies behind it, is out of bounds."""
    x, out = torch.rand(101), torch.empty(101)
    with pytest.raises(PtxError, match="store of 4 bytes outside"):
        run_functions(0, 80, x, out, [x])
    with pytest.raises(PtxError, match="load of 4 bytes outside every argument: 1 lanes"):
        run_functions(0, 80, x, out, [x[:100], out])
    with pytest.raises(PtxError, match="an argument of 8 bytes for a parameter of 32"):
        kernel("functions", 80).launch((1,), 32, [bytes(8)])


@pytest.mark.parametrize("arch", ARCHS)
def test_reductions_of_a_block(arch):
    """Static shared numbers beside dynamic ones, barriers that combine a predicate, atomics of every width."""
    x = torch.randint(0, 80, (3, 128), dtype=torch.int32)
    x[1, 5], x[2, 5] = 7, 99
    x[0] = x[0].clamp(10)
    counts, largest, sums = torch.zeros(3, 5, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.zeros(4)
    kernel("reductions", arch).launch((3,), 128, [x, counts, largest, sums], shared=512)
    expected = [[(row == 7).any(), (row < 90).all(), (row < 10).sum(), row.sum(), row[99]] for row in x]
    assert counts.tolist() == [[int(number) for number in row] for row in expected]
    assert largest.item() == x.max().item() << 33
    assert sums.tolist() == x.flip(1).view(3, 32, 4).sum((0, 1)).tolist()


def test_race_between_static_and_dynamic_arrays():
    """They are apart: a store too far in the dynamic array is out of bounds, and a missing barrier is seen."""
    x, counts = torch.zeros(128, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    arguments = [x, counts, torch.zeros(1, dtype=torch.int64), torch.zeros(4)]
    with pytest.raises(PtxError, match="shared store outside"):
        kernel("reductions", 80).launch((1,), 128, arguments, shared=508)
    ptx, barriers = re.subn(r"bar\.red\.\w+\.(u32|pred)\s+(%\w+), 0, %p1;", r"mov.\1 \2, 0;", nvcc.ptx(SOURCE, 80))
    assert barriers == 3
    with pytest.raises(PtxError, match="race in shared memory: load after another warp's store"):
        Kernel(ptx, "_Z10reductionsPKiPiPyPf").launch((1,), 128, arguments, shared=512)


@pytest.mark.parametrize("arch", ARCHS)
def test_constant_tables(arch):
    y = torch.empty(32)
    kernel("tables", arch).launch((1,), 32, [y])
    squares, primes = [0, 1, 4, 9, 16, 25, 36, 0], [2, 3, 5, 7, 11]
    assert y.tolist() == [squares[i % 8] + 100 * primes[i % 5] for i in range(32)]


def test_local_memory_is_refused():
    with pytest.raises(PtxError, match="not modelled: __local_depot"):
        kernel("stack", 80).launch((1,), 32, [torch.zeros(32, dtype=torch.int32)] * 2)


@pytest.mark.parametrize("arch", [*ARCHS, 89])
def test_narrow_numbers(arch):
    x = torch.cat([torch.randn(60), torch.tensor([1000.0, -449, 0.001, -0.0])]).repeat(2).view(32, 4)
    half, wide = torch.empty(32, 4, dtype=torch.float16), torch.empty(32, 4)
    brain, eight = torch.empty(32, 4, dtype=torch.bfloat16), torch.zeros(32, 4, dtype=torch.uint8)
    kernel("narrow", arch).launch((1,), 32, [x, half, brain, eight, wide])
    nearest = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(eight, nearest.view(torch.uint8)) and torch.equal(wide, nearest.float())
    first, second = x.half().view(32, 2, 2).unbind(1)
    fused = (first.double() * second.double() + second.double()).half()
    assert torch.equal(half, torch.cat([fused, first.maximum(second)], 1))
    product = (x.bfloat16() * 1.5)
    product[:, 0] = torch.where(product[:, 0] > product[:, 1], 0, product[:, 0])
    assert torch.equal(brain, product)


def bits(a, b, c, d, lane, lanes):
    """What planted_ptx.cu's kernel stores for a lane; a, b, c, d: its arguments as signed numbers."""
    low, high = (number % WORD for number in (a, b))
    eight = (high << 32 | low).to_bytes(8, "little")
    products = sum(int.from_bytes([x], "little", signed=True) * int.from_bytes([y], "little", signed=True)
                   for x, y in zip(low.to_bytes(4, "little"), high.to_bytes(4, "little")))
    first = (a & -a).bit_length()
    zeros = 64 - (c % WORD ** 2).bit_length()
    unsigned = (c % WORD ** 2) * (d % WORD ** 2) >> 64
    other = lanes[lane + 3] if lane % 8 < 5 else a
    return [first + 100 * (c % WORD ** 2).bit_count() + 10000 * zeros, int(f"{low:032b}"[::-1], 2), low * high >> 32,
            (unsigned + 2 ** 63) % 2 ** 64 - 2 ** 63, products + 5, (high << 32 | low) >> lane % 32 & WORD - 1,
            int.from_bytes(bytes(eight[n] for n in (2, 4, 1, 5)), "little"),
            (abs(c) // abs(d)) * (1 if (c < 0) == (d < 0) else -1) if d else 0,
            abs(a) % abs(b) * (1 if a >= 0 else -1) if b else 0,
            sum(1 << n for n, number in enumerate(lanes) if number & 3 == a & 3), other,
            sum(1 << n for n, number in enumerate(lanes) if number < 0)]


@pytest.mark.parametrize("arch", ARCHS)
def test_bits(arch):
    x = torch.randint(-2 ** 31, 2 ** 31, (32,)).to(torch.int32)
    wide = torch.randint(-2 ** 62, 2 ** 62, (32,)) >> torch.randint(0, 60, (32,))
    x[3], wide[4], wide[9] = 0, 0, -1
    y = torch.empty(12, 32, dtype=torch.int64)
    kernel("bits", arch).launch((1,), 32, [x, wide, y])
    lanes, longs = x.tolist(), wide.tolist()
    for lane in range(32):
        following = (lane + 1) % 32
        wanted = bits(lanes[lane], lanes[following], longs[lane], longs[following], lane, lanes)
        assert y[:, lane].tolist() == wanted, lane


def test_the_loop_that_streams():
    """It is the hot one where that is asked for, and of its loads the widest count."""
    cubin = nvcc.cubin(nvcc.ptx(SOURCE, 80), "_Z6streamPK5uint4PKiPS_i", 80)
    streaming, plain = describe(cubin, 80, 4, 0, streams=True), describe(cubin, 80, 4, 0)
    assert streaming["loop"]["gmem"] == 2 and plain["loop"]["gmem"] == 1
    per_warp = streaming["bytes_per_clock"] * sum(streaming["loop"].values())
    assert 256 < per_warp <= 512 and streaming["bytes_per_clock"] > 2 * plain["bytes_per_clock"]


def test_machine_code_of_one_kernel():
    """The cubin has the one entry asked for."""
    found = describe(nvcc.cubin(nvcc.ptx(SOURCE, 80), "_Z10reductionsPKiPiPyPf", 80), 80, 4, 512)
    assert found["spills"] == 0 and found["widths"]["LDG.32"] == 1
