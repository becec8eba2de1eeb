"""Each modelled PTX instruction against plain Python or torch, on numbers that include the extremes."""
import itertools
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ptx_machine import PtxError
from ptx_snippets import run, run_word

WORD = 2 ** 32
EXTREMES = [0, 1, 2, 31, 32, 33, 0x7F, 0x80, 0xFF, 0x1234, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF,
            0xFFFFFFFF]


def signed(value, bits=32):
    value &= 2 ** bits - 1
    return value - 2 ** bits if value >> bits - 1 else value


def integers(count):
    """int32 (threads, count): all pairs of the extremes, the further columns at random."""
    pairs = torch.tensor(list(itertools.product(EXTREMES, repeat=2)))
    more = torch.randint(0, WORD, (len(pairs), max(0, count - 2)))
    columns = torch.cat([pairs, more], 1)[:, :count]
    return torch.where(columns >= WORD // 2, columns - WORD, columns).to(torch.int32)


def bit_field(value, position, length):
    return value >> min(position & 255, 64) & 2 ** (length & 255) - 1


def insert_field(field, value, position, length):
    position, length = position & 255, length & 255
    mask = (2 ** length - 1) << position
    return value & ~mask | field << position & mask


def permuted(low, high, selectors):
    source = struct.pack("<II", low, high)
    result = 0
    for place in range(4):
        selector = selectors >> 4 * place & 15
        byte = source[selector & 7]
        result |= ((255 if byte & 128 else 0) if selector & 8 else byte) << 8 * place
    return result


def byte_products(a, b, bits_a, bits_b):
    """Of four bytes; bits: 8 where they are signed."""
    pairs = zip(struct.pack("<I", a), struct.pack("<I", b))
    return sum((signed(x, bits_a) if bits_a else x) * (signed(y, bits_b) if bits_b else y) for x, y in pairs)


def divided(a, b):
    return int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b)) if b else 0


INTEGER = {
    "add.s32 %r31, %r0, %r1;": lambda a, b: a + b,
    "sub.s32 %r31, %r0, %r1;": lambda a, b: a - b,
    "mul.lo.s32 %r31, %r0, %r1;": lambda a, b: a * b,
    "mul.hi.u32 %r31, %r0, %r1;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r31, %r0, %r1;": lambda a, b: signed(a) * signed(b) >> 32,
    "mul24.lo.u32 %r31, %r0, %r1;": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul24.hi.s32 %r31, %r0, %r1;": lambda a, b: signed(a, 24) * signed(b, 24) >> 16,
    "mad.lo.s32 %r31, %r0, %r1, %r2;": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r31, %r0, %r1, %r2;": lambda a, b, c: (a * b >> 32) + c,
    "min.u32 %r31, %r0, %r1;": min,
    "max.s32 %r31, %r0, %r1;": lambda a, b: max(signed(a), signed(b)),
    "abs.s32 %r31, %r0;": lambda a: abs(signed(a)),
    "neg.s32 %r31, %r0;": lambda a: -a,
    "not.b32 %r31, %r0;": lambda a: ~a,
    "and.b32 %r31, %r0, 0xF0F;": lambda a: a & 0xF0F,
    "xor.b32 %r31, %r0, %r1;": lambda a, b: a ^ b,
    "or.b32 %r31, %r0, -2;": lambda a: a | -2,
    "shl.b32 %r31, %r0, %r1;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %r31, %r0, %r1;": lambda a, b: a >> min(b, 32),
    "shr.s32 %r31, %r0, %r1;": lambda a, b: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r31, %r0, %r1, %r2;": lambda a, b, c: (b << 32 | a) << c % 32 >> 32,
    "shf.r.clamp.b32 %r31, %r0, %r1, %r2;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 %r31, %r0, 5, 9;": lambda a: bit_field(a, 5, 9),
    "bfe.s32 %r31, %r0, 5, 9;": lambda a: signed(bit_field(a, 5, 9), 9),
    "bfi.b32 %r31, %r0, %r1, 7, 11;": lambda a, b: insert_field(a, b, 7, 11),
    "popc.b32 %r31, %r0;": lambda a: a.bit_count(),
    "clz.b32 %r31, %r0;": lambda a: 32 - a.bit_length(),
    "brev.b32 %r31, %r0;": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %r31, %r0;": lambda a: a.bit_length() - 1,
    "bfind.s32 %r31, %r0;": lambda a: (signed(a) if signed(a) >= 0 else ~signed(a)).bit_length() - 1,
    "bfind.shiftamt.u32 %r31, %r0;": lambda a: 32 - a.bit_length() if a else -1,
    "dp4a.u32.u32 %r31, %r0, %r1, %r2;": lambda a, b, c: byte_products(a, b, 0, 0) + c,
    "dp4a.s32.u32 %r31, %r0, %r1, %r2;": lambda a, b, c: byte_products(a, b, 8, 0) + c,
    "dp4a.s32.s32 %r31, %r0, %r1, %r2;": lambda a, b, c: byte_products(a, b, 8, 8) + c,
    "set.lt.u32.s32 %r31, %r0, %r1;": lambda a, b: -1 if signed(a) < signed(b) else 0,
    "mov.u32 %r31, %lanemask_lt; mov.u32 %r30, %lanemask_ge; xor.b32 %r31, %r31, %r30;": lambda a: -1,
    "lop3.b32 %r31, %r0, %r1, %r2, 0xD8;": lambda a, b, c: c & b | ~c & a,
    "prmt.b32 %r31, %r0, %r1, %r2;": permuted,
    "div.u32 %r31, %r0, %r1;": lambda a, b: a // b if b else None,
    "rem.u32 %r31, %r0, %r1;": lambda a, b: a % b if b else None,
    "rem.s32 %r31, %r0, %r1;": lambda a, b: math.fmod(signed(a), signed(b)) if b else None,
    "setp.lt.s32 %p0, %r0, %r1; selp.b32 %r31, %r2, %r3, %p0;": lambda a, b, c, d: c if signed(a) < signed(b) else d,
    "setp.hs.u32 %p0, %r0, %r1; selp.b32 %r31, 1, 0, %p0;": lambda a, b: a >= b,
    "setp.eq.s32 %p0|%p1, %r0, %r1; selp.b32 %r31, 1, 0, %p1;": lambda a, b: a != b,
    "setp.ne.s32 %p0, %r0, 0; setp.ne.and.s32 %p1, %r1, 0, !%p0; selp.b32 %r31, 1, 0, %p1;":
        lambda a, b: b != 0 and a == 0,
    "cvt.s32.s8 %r31, %r0;": lambda a: signed(a, 8),
    "cvt.u32.u16 %r31, %r0;": lambda a: a & 0xFFFF,
    "cvt.sat.u8.s32 %r31, %r0;": lambda a: min(max(signed(a), 0), 255),
    "mov.b32 {%h0, %h1}, %r0; mov.b32 %r31, {%h1, %h0};": lambda a: a >> 16 | a << 16,
    "{ .reg .b32 %r0; mov.u32 %r0, 7; mov.u32 %r31, %r0; } add.s32 %r31, %r31, %r0;": lambda a: a + 7,
}


@pytest.mark.parametrize("body", INTEGER)
def test_integers(body):
    expected = INTEGER[body]
    inputs = integers(expected.__code__.co_argcount if hasattr(expected, "__code__") else 2)
    for row, actual in zip(inputs.tolist(), run_word(body, inputs).tolist()):
        wanted = expected(*[value % WORD for value in row])
        assert wanted is None or actual % WORD == int(wanted) % WORD, f"{[hex(value % WORD) for value in row]}"


WIDE = {
    "mul.wide.u32 %d7, %r0, %r1;": lambda a, b, c, d: a * b,
    "mul.wide.s32 %d7, %r0, %r1;": lambda a, b, c, d: signed(a) * signed(b),
    "mad.wide.s32 %d7, %r0, %r1, %d1;": lambda a, b, c, d: signed(a) * signed(b) + (d << 32 | c),
    "mul.lo.s64 %d7, %d0, %d1;": lambda a, b, c, d: (b << 32 | a) * (d << 32 | c),
    "mul.hi.u64 %d7, %d0, %d1;": lambda a, b, c, d: (b << 32 | a) * (d << 32 | c) >> 64,
    "add.s64 %d7, %d0, -5;": lambda a, b, c, d: (b << 32 | a) - 5,
    "shr.u64 %d7, %d0, 9;": lambda a, b, c, d: (b << 32 | a) >> 9,
    "div.s64 %d7, %d0, %d1;": lambda a, b, c, d: divided(signed(b << 32 | a, 64), signed(d << 32 | c, 64)),
    "cvt.s64.s32 %d7, %r0;": lambda a, b, c, d: signed(a),
    "cvt.u64.u32 %d7, %r0;": lambda a, b, c, d: a,
    "mov.b64 {%r8, %r9}, %d0; mov.b64 %d7, {%r9, %r8};": lambda a, b, c, d: a << 32 | b,
}


@pytest.mark.parametrize("body", WIDE)
def test_64_bits(body):
    inputs = integers(4)
    for row, (low, high) in zip(inputs.tolist(), run(body, inputs).tolist()):
        a, b, c, d = (value % WORD for value in row)
        if "div" not in body or c or d:
            assert (high % WORD) << 32 | low % WORD == WIDE[body](a, b, c, d) % 2 ** 64


def floats(count):
    """float32 (threads, count): pairs of special numbers, and random ones of many sizes."""
    special = [0.0, -0.0, 1.0, -2.5, 1e-3, 65519.0, 3e38, math.inf, -math.inf, math.nan]
    pairs = torch.tensor(list(itertools.product(special, repeat=2)))
    rows = torch.cat([pairs, torch.randn(60, 2) * torch.logspace(-4, 4, 60)[:, None]])
    return torch.cat([rows, torch.randn(len(rows), count)], 1)[:, :count].contiguous()


FLOAT = {
    "add.rn.ftz.f32 %r31, %r0, %r1;": lambda a, b: a + b,
    "sub.f32 %r31, %r0, 0f3FC00000;": lambda a, b: a - 1.5,
    "mul.f32 %r31, %r0, %r1;": lambda a, b: a * b,
    "div.full.f32 %r31, %r0, %r1;": lambda a, b: a / b,
    "fma.rn.f32 %r31, %r0, %r1, %r1;": lambda a, b: (a.double() * b.double() + b.double()).float(),
    "min.f32 %r31, %r0, %r1;": torch.fmin,
    "max.f32 %r31, %r0, %r1;": torch.fmax,
    "max.NaN.f32 %r31, %r0, %r1;": torch.maximum,
    "min.xorsign.abs.f32 %r31, %r0, %r1;": lambda a, b: torch.copysign(torch.fmin(a.abs(), b.abs()), torch.where(
        a.signbit() ^ b.signbit(), -1.0, 1.0)),
    "neg.f32 %r31, %r0;": lambda a, b: -a,
    "abs.f32 %r31, %r0;": lambda a, b: a.abs(),
    "copysign.f32 %r31, %r0, %r1;": lambda a, b: torch.copysign(b, a),
    "cvt.rmi.f32.f32 %r31, %r0;": lambda a, b: a.floor(),
    "cvt.rni.f32.f32 %r31, %r0;": lambda a, b: a.round(),
    "cvt.sat.f32.f32 %r31, %r0;": lambda a, b: a.nan_to_num().clamp(0, 1),
    "setp.lt.f32 %p0, %r0, %r1; selp.f32 %r31, %r0, %r1, %p0;": lambda a, b: torch.where(a < b, a, b),
    "setp.gtu.f32 %p0, %r0, %r1; selp.f32 %r31, %r0, %r1, %p0;": lambda a, b: torch.where(~(a <= b), a, b),
    "setp.ne.f32 %p0, %r0, %r1; selp.f32 %r31, %r0, %r1, %p0;": lambda a, b: torch.where((a < b) | (a > b), a, b),
    "setp.nan.f32 %p0, %r0, %r1; selp.f32 %r31, %r0, %r1, %p0;": lambda a, b: torch.where((a + b - a - b).isnan() & (
        a.isnan() | b.isnan()), a, b),
    "cvt.rn.f16.f32 %h0, %r0; cvt.f32.f16 %r31, %h0;": lambda a, b: a.half().float(),
    "cvt.rn.bf16.f32 %h0, %r0; cvt.f32.bf16 %r31, %h0;": lambda a, b: a.bfloat16().float(),
    "set.gt.f32.f32 %r31, %r0, %r1;": lambda a, b: (a > b).float(),
    "setp.ltu.f32 %p0, %r0, %r1; selp.f32 %r31, 1, 0, %p0;": lambda a, b: torch.zeros_like(a).masked_fill(~(a >= b), 2 ** -149),
    "cvt.f64.f32 %d3, %r0; mul.f64 %d3, %d3, %d3; cvt.rn.f32.f64 %r31, %d3;": lambda a, b: a.double().square().float(),
}
DIRECTED = {"add": lambda a, b, c: a + b, "sub": lambda a, b, c: a - b, "mul": lambda a, b, c: a * b,
            "fma": lambda a, b, c: a * b + c}
FUNCTIONS = {"ex2.approx": torch.exp2, "lg2.approx": torch.log2, "rcp.rn": torch.reciprocal,
             "rsqrt.approx": torch.rsqrt, "sqrt.rn": torch.sqrt, "tanh.approx": torch.tanh, "sin.approx": torch.sin,
             "cos.approx": torch.cos}


@pytest.mark.parametrize("body", FLOAT)
def test_floats(body):
    inputs = floats(2)
    expected = FLOAT[body](inputs[:, 0], inputs[:, 1])
    torch.testing.assert_close(run_word(body, inputs).view(torch.float32), expected, rtol=0, atol=0, equal_nan=True)


def exactly(function, row, direction):
    """float32 of the exact result, rounded in a direction."""
    exact = function(*map(Fraction, row))
    nearest = np.float32(float(exact))
    towards = {"rm": -np.inf, "rp": np.inf, "rz": -np.inf if exact > 0 else np.inf}[direction]
    wrong = Fraction(float(nearest)) > exact if towards < 0 else Fraction(float(nearest)) < exact
    return np.nextafter(nearest, np.float32(towards)) if wrong else nearest


@pytest.mark.parametrize("direction", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", DIRECTED)
def test_directed_rounding(name, direction):
    """Sums whose parts are up to 2**80 apart among them."""
    inputs = torch.randn(96, 3) * 2.0 ** torch.randint(-40, 40, (96, 3))
    inputs[0, 1] = inputs[0, 2] = 0
    operands = "%r0, %r1, %r2" if name == "fma" else "%r0, %r1"
    actual = run_word(f"{name}.{direction}.ftz.f32 %r31, {operands};", inputs).view(torch.float32)
    wanted = [exactly(DIRECTED[name], row, direction) for row in inputs.tolist()]
    assert actual.tolist() == [float(value) for value in wanted]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    inputs = floats(1)[96:]
    actual = run_word(f"{name}.f32 %r31, %r0;", inputs).view(torch.float32)
    torch.testing.assert_close(actual, FUNCTIONS[name](inputs[:, 0]), rtol=1e-6, atol=1e-6, equal_nan=True)


PACKED = {
    "add.rn": lambda a, b, c: a + b,
    "sub.rn": lambda a, b, c: a - b,
    "mul.rn": lambda a, b, c: a * b,
    "min": lambda a, b, c: torch.fmin(a, b),
    "max.NaN": lambda a, b, c: torch.maximum(a, b),
    "fma.rn": lambda a, b, c: (a.double() * b.double() + c.double()).to(a.dtype),
    "fma.rn.relu": lambda a, b, c: (a.double() * b.double() + c.double()).to(a.dtype).relu(),
    "neg": lambda a, b, c: -a,
    "abs": lambda a, b, c: a.abs(),
}


@pytest.mark.parametrize("element, packed", [(torch.float16, "f16x2"), (torch.bfloat16, "bf16x2")])
@pytest.mark.parametrize("name", PACKED)
def test_packed_halves(name, element, packed):
    numbers = torch.randn(64, 3, 2).to(element)
    operands = ", ".join(["%r0", "%r1", "%r2"][:1 if name in ("neg", "abs") else 3 if "fma" in name else 2])
    result = run_word(f"{name}.{packed} %r31, {operands};", numbers.view(torch.int32).reshape(64, 3))
    expected = PACKED[name](*numbers.unbind(1))
    torch.testing.assert_close(result.view(element).reshape(64, 2), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("newer", "older"), [
    ("cvt.f32.bf16 %r31, %h0;", "mov.b32 %r31, {0, %h0};"),
    ("sub.bf16x2 %r31, %r0, %r1;", "mov.b32 %r2, 0xbf80bf80U; fma.rn.bf16x2 %r31, %r1, %r2, %r0;")])
def test_what_sm_90_has_an_instruction_for(newer, older):
    """Every number of 16 bits, beside all others in some order."""
    a = torch.arange(2 ** 16, dtype=torch.int32).to(torch.int16).view(-1, 512)
    b = a.flatten()[torch.randperm(2 ** 16)].view(-1, 512)
    for words in torch.stack((a, b), 1).view(torch.int32):
        results = [run_word(f"mov.b32 {{%h0, %h1}}, %r0; {body}", words.t().contiguous()) for body in (newer, older)]
        found, expected = (result.view(torch.float32 if "cvt" in newer else torch.bfloat16) for result in results)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["add.rn", "mul.rn", "fma.rn"])
def test_packed_float32(name):
    numbers = torch.randn(64, 3, 2)
    operands = "%d0, %d1, %d2" if "fma" in name else "%d0, %d1"
    result = run(f"{name}.f32x2 %d7, {operands};", numbers.reshape(64, 6)).view(torch.float32)
    torch.testing.assert_close(result, PACKED[name](*numbers.unbind(1)), rtol=0, atol=0)


@pytest.mark.parametrize("element, name", [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_scalar_halves(element, name):
    numbers = torch.randn(64, 2).to(element)
    body = f"""mov.b32 {{%h0, %h1}}, %r0; fma.rn.{name} %h2, %h0, %h1, %h1; min.{name} %h3, %h0, %h1;
        mov.b32 %r31, {{%h2, %h3}};"""
    result = run_word(body, numbers.view(torch.int32)).view(element).reshape(64, 2)
    a, b = numbers.unbind(1)
    assert torch.equal(result[:, 0], (a.double() * b.double() + b.double()).to(element))
    assert torch.equal(result[:, 1], torch.fmin(a, b))


@pytest.mark.parametrize("element, packed", [(torch.float16, "f16x2"), (torch.bfloat16, "bf16x2")])
def test_two_conversions_in_one(element, packed):
    inputs = floats(2)
    result = run_word(f"cvt.rn.{packed}.f32 %r31, %r0, %r1;", inputs).view(element).reshape(-1, 2)
    torch.testing.assert_close(result, inputs.flip(1).to(element), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name, element", [("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)])
def test_conversions_of_8_bits(name, element):
    """Two numbers from float32 and from float16, the larger ones saturated, and back."""
    inputs = torch.cat([floats(2).nan_to_num(0, 1e9, -1e9), torch.randn(60, 2)])
    inputs = inputs[:len(inputs) // 32 * 32]
    body = f"""cvt.rn.satfinite.{name}.f32 %h0, %r1, %r0; cvt.rn.f16x2.{name} %r31, %h0;
        cvt.rn.f16x2.f32 %r8, %r1, %r0; cvt.rn.satfinite.{name}.f16x2 %h1, %r8; mov.b32 %r30, {{%h0, %h1}};
        mov.b64 %d7, {{%r30, %r31}};"""
    eight, wide = run(body, inputs).unbind(1)
    top = torch.finfo(element).max
    nearest, of_half = (values.clamp(-top, top).to(element) for values in (inputs, inputs.half().float()))
    assert torch.equal(eight.contiguous().view(torch.uint8).view(-1, 4), torch.cat([nearest, of_half], 1).view(torch.uint8))
    assert torch.equal(wide.contiguous().view(torch.float16).view(-1, 2), nearest.half())


@pytest.mark.parametrize("rounding, expected", [("rzi", torch.trunc), ("rni", torch.round), ("rmi", torch.floor),
                                                ("rpi", torch.ceil)])
def test_float_to_integer_saturates(rounding, expected):
    inputs = floats(1)
    wanted = expected(inputs[:, 0].double()).nan_to_num(0).clamp(-2 ** 31, 2 ** 31 - 1).long()
    assert torch.equal(run_word(f"cvt.{rounding}.s32.f32 %r31, %r0;", inputs).long(), wanted)


@pytest.mark.parametrize("kind, element", [("s32", torch.int32), ("s64", torch.int64)])
def test_integer_to_float(kind, element):
    inputs = integers(2)
    source = "%r0" if kind == "s32" else "%d0"
    result = run_word(f"cvt.rn.f32.{kind} %r31, {source};", inputs).view(torch.float32)
    assert torch.equal(result, inputs.view(element)[:, 0].float())


def test_tf32_conversion_rounds_ties_away():
    inputs = torch.tensor([[0x3F800FFF], [0x3F801000], [0x3F803000]] * 11)[:32].to(torch.int32)
    expected = torch.tensor([0x3F800000, 0x3F802000, 0x3F804000] * 11)[:32].to(torch.int32)
    assert torch.equal(run_word("cvt.rna.tf32.f32 %r31, %r0;", inputs), expected)


LANES = torch.arange(64, dtype=torch.int32)[:, None]
SHUFFLES = {
    "shfl.sync.bfly.b32 %r31, %r0, 5, 31, -1;": lambda lane: lane ^ 5,
    "shfl.sync.down.b32 %r31, %r0, 3, 31, -1;": lambda lane: lane + 3 if lane % 32 < 29 else lane,
    "shfl.sync.up.b32 %r31, %r0, 3, 0, -1;": lambda lane: lane - 3 if lane % 32 >= 3 else lane,
    "shfl.sync.idx.b32 %r31, %r0, 9, 31, -1;": lambda lane: lane // 32 * 32 + 9,
    "shfl.sync.idx.b32 %r31, %r0, 2, 0x181F, -1;": lambda lane: lane // 8 * 8 + 2,
    "shfl.sync.down.b32 %r8|%p0, %r0, 3, 31, -1; selp.b32 %r31, 1, 0, %p0;": lambda lane: lane % 32 < 29,
    "activemask.b32 %r31;": lambda lane: -1,
    "setp.lt.s32 %p0, %r0, 3; vote.sync.ballot.b32 %r31, %p0, -1;": lambda lane: 7 if lane < 32 else 0,
    "setp.lt.s32 %p0, %r0, 3; vote.sync.any.pred %p1, %p0, -1; selp.b32 %r31, 1, 0, %p1;": lambda lane: lane < 32,
    "setp.lt.s32 %p0, %r0, 32; vote.sync.all.pred %p1, %p0, -1; selp.b32 %r31, 1, 0, %p1;": lambda lane: lane < 32,
    "and.b32 %r8, %r0, 3; match.any.sync.b32 %r31, %r8, -1;": lambda lane: signed(0x11111111 << lane % 4),
    "shr.u32 %r8, %r0, 5; match.all.sync.b32 %r31|%p0, %r8, -1; @!%p0 trap;": lambda lane: -1,
    "match.all.sync.b32 %r9|%p0, %r0, -1; selp.b32 %r31, 1, %r9, %p0;": lambda lane: 0,
    "setp.lt.s32 %p0, %r0, 40; bar.red.popc.u32 %r31, 0, %p0;": lambda lane: 40,
    "setp.lt.s32 %p0, %r0, 40; bar.red.and.pred %p1, 0, !%p0; selp.b32 %r31, 1, 0, %p1;": lambda lane: 0,
    "setp.ge.u32 %p0, %tid, 32; @%p0 bra $end; bar.red.popc.u32 %r31, 0, 1; $end:": lambda lane: 32 if lane < 32 else -1,
    "elect.sync %r8|%p0, -1; selp.b32 %r31, 1, 0, %p0;": lambda lane: lane % 32 == 0,
    "redux.sync.max.s32 %r31, %r0, -1;": lambda lane: lane // 32 * 32 + 31,
    "redux.sync.add.u32 %r31, %r0, -1;": lambda lane: 496 if lane < 32 else 1520,
    "mov.u32 %r31, %laneid;": lambda lane: lane % 32,
    "mov.u32 %r31, %ntid.x;": lambda lane: 64,
}


@pytest.mark.parametrize("body", SHUFFLES)
def test_warps(body):
    assert run_word(body, LANES).tolist() == [int(SHUFFLES[body](lane)) for lane in range(64)]


ATOMICS = {
    "atom.shared.add.u32 %r31, [%d0], 2;": lambda: ([2 * lane for lane in range(64)], 128),
    "atom.shared.max.s32 %r31, [%d0], %r2;": lambda: ([0, *range(63)], 63),
    "atom.shared.exch.b32 %r31, [%d0], %r2;": lambda: ([0, *range(63)], 63),
    "atom.shared.cas.b32 %r31, [%d0], 0, 7;": lambda: ([0] + [7] * 63, 7),
    "atom.shared.inc.u32 %r31, [%d0], 9;": lambda: ([lane % 10 for lane in range(64)], 4),
    "atom.shared.dec.u32 %r31, [%d0], 9;": lambda: ([-lane % 10 for lane in range(64)], 6),
    "red.shared.or.b32 [%d0], %r2; mov.u32 %r31, 0;": lambda: ([0] * 64, 63),
}


@pytest.mark.parametrize("body", ATOMICS)
def test_atomics_run_one_lane_after_another(body):
    body = "mov.u64 %d0, dynamic; st.shared.u32 [%d0], 0; bar.sync 0;" + body
    old, final = ATOMICS[body.split("bar.sync 0;")[1]]()
    inputs = torch.cat([LANES * 0, LANES * 0, LANES], 1)
    body += "bar.sync 0; ld.shared.u32 %r30, [%d0]; mov.b64 %d7, {%r31, %r30};"
    result = run(body, inputs, shared=64, races=False)
    assert result[:, 0].tolist() == old and result[:, 1].tolist() == [final] * 64


@pytest.mark.parametrize("body", [
    "dp2a.lo.u32.u32 %r31, %r0, %r1, %r2;", "add.cc.u32 %r31, %r0, %r1;",
    "add.rz.f64 %d7, %d0, %d1;", "div.rz.f32 %r31, %r0, %r1;",
    "setp.lt.f16x2 %p0|%p1, %r0, %r1;", "set.lt.f16x2.f16x2 %r31, %r0, %r1;", "max.f32 %r31, %r0, %r1, %r2;",
    "add.sat.s32 %r31, %r0, %r1;", "prmt.b32.f4e %r31, %r0, %r1, %r2;", "cvt.rz.bf16.f32 %h0, %r0;",
    "cvt.rz.satfinite.e4m3x2.f32 %h0, %r0, %r1;", "ld.local.b32 %r31, [%d0];", "call foo, (%r1);",
    "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r0,%r1,%r2,%r3}, {%r0,%r1}, {%r0}, {%r0,%r1,%r2,%r3};",
    "cp.async.bulk.shared.global [%d0], [%d1], 16, [%d2];", "mbarrier.init.shared.b64 [%d0], 1;", "bar.sync 1, 64;",
    "mov.u32 %r31, %clock;", "atom.shared.frob.u32 %r31, [%d0], 1;"])
def test_what_is_not_modelled_is_named(body):
    with pytest.raises(PtxError, match="not modelled|no destination|not a dest"):
        run_word(body, LANES[:32])
