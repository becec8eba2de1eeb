"""PTX instructions that each thread does by itself: arithmetic, logic, comparison, selection, moves.

A builder takes the registers and an Instruction and returns a function of the mask of active threads.
"""
import dataclasses

import numpy as np
from number_formats import bfloat16_to_float32, float32_to_bfloat16
from ptx_operands import PREDICATE
from ptx_parser import PtxError, Type, vector
from ptx_rounding import DIRECTIONS, directed

SHIFT = Type("u", 32)
NOT_MODELLED = (*DIRECTIONS, "sat", "cc")
PACKED = ("f16x2", "bf16x2", "f32x2")
WIDER = {np.float16: np.float64, np.float32: np.float64, np.float64: np.longdouble}


def elementwise(registers, instruction, function, result, sources):
    """destination = function(operands), with the operands' types given one by one."""
    read = [registers.source(*pair) for pair in zip(instruction.operands[1:], sources, strict=True)]
    write = registers.writer(instruction.operands[0], result)
    return lambda active: write(function(*[operand() for operand in read]), active)


def arithmetic(float_function, integer_function):
    """A builder for an opcode whose operands and result are all of one type."""
    def build(registers, instruction):
        kind, function = instruction.type, directed(instruction)
        if function is None:
            _refuse_modifiers(instruction)
            if instruction.has(*PACKED):
                return _packed(registers, instruction, float_function)
            function = float_function if kind.dtype in WIDER else integer_function
        if function is None:
            raise PtxError(f"type not modelled: {instruction.text}")
        if instruction.has("relu"):
            function = _relu(function)
        return elementwise(registers, instruction, function, kind, [kind] * (len(instruction.operands) - 1))
    return build


def _refuse_modifiers(instruction):
    if instruction.has(*NOT_MODELLED):
        raise PtxError(f"modifier not modelled: {instruction.text}")


def _relu(function):
    return lambda *operands: np.maximum(function(*operands), 0)


def _packed(registers, instruction, function):
    """Two numbers to a register, each operated on by itself."""
    kind = instruction.type
    name = next(modifier for modifier in instruction.modifiers if modifier in PACKED)
    function = _relu(function) if instruction.has("relu") else function

    def operate(*operands):
        return pack(function(*[unpack(operand, name) for operand in operands]), name)
    return elementwise(registers, instruction, operate, kind, [kind] * (len(instruction.operands) - 1))


def unpack(packed, name):
    """The numbers in packed registers, on a new last axis."""
    if name == "bf16x2":
        return bfloat16_to_float32(np.ascontiguousarray(packed).view(np.uint16)).reshape(*packed.shape, 2)
    number = np.float32 if name == "f32x2" else np.float16
    return np.ascontiguousarray(packed).view(number).reshape(*packed.shape, 2)


def pack(numbers, name):
    if name == "bf16x2":
        return float32_to_bfloat16(numbers).view(np.uint32)[..., 0]
    number, whole = (np.float32, np.uint64) if name == "f32x2" else (np.float16, np.uint32)
    return np.ascontiguousarray(numbers, number).view(whole)[..., 0]


def _fused_multiply_add(a, b, c):
    """In the next wider format: the product is exact there, so that all but a few results are rounded once."""
    wide = WIDER[a.dtype.type]
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _extremum(ignoring_nan, keeping_nan):
    """min or max: .NaN lets a NaN win; .xorsign.abs compares magnitudes and gives the result the product's sign."""
    def build(registers, instruction):
        if len(instruction.operands) != 3:
            raise PtxError(f"form not modelled: {instruction.text}")
        function = keeping_nan if instruction.has("NaN") else ignoring_nan
        if instruction.has("xorsign"):
            function = _with_sign_of_product(function)
        return arithmetic(function, keeping_nan)(registers, instruction)
    return build


def _with_sign_of_product(function):
    def operate(a, b):
        magnitude = function(np.abs(a), np.abs(b))
        return np.where(np.signbit(a) ^ np.signbit(b), -magnitude, magnitude)
    return operate


def _divide(a, b):
    """Integer division that rounds to zero; by 0 anything goes."""
    divisor = np.where(b == 0, 1, b).astype(a.dtype)
    return (a - np.fmod(a, divisor)) // divisor


def _remainder(a, b):
    return np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype))


def _product(registers, instruction):
    """mul and mad: .lo and floating point, .wide, .hi; the third operand has the result's type."""
    kind = instruction.type
    if kind.dtype in WIDER or instruction.has(*PACKED):
        function = np.multiply if instruction.opcode == "mul" else _fused_multiply_add
        return arithmetic(function, None)(registers, instruction)
    _refuse_modifiers(instruction)
    result = Type(kind.kind, 2 * kind.bits) if instruction.has("wide") else kind
    multiply = _high_product(kind) if instruction.has("hi") else lambda a, b: a.astype(result.dtype) * b
    if instruction.opcode == "mul":
        return elementwise(registers, instruction, multiply, result, [kind, kind])
    return elementwise(registers, instruction, lambda a, b, c: multiply(a, b) + c, result, [kind, kind, result])


def _high_product(kind):
    if kind.bits == 64:
        return lambda a, b: _high_words(a.astype(object) * b.astype(object)).view(kind.dtype)
    wide = Type(kind.kind, 64).dtype
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(kind.bits)).astype(kind.dtype)


def _high_words(products):
    """The upper 64 bits of Python integers of 128."""
    return (products >> 64 & 2 ** 64 - 1).astype(np.uint64)


def _product_of_24_bits(registers, instruction):
    kind = instruction.type
    shift = 16 if instruction.has("hi") else 0

    def multiply(a, b):
        a, b = (operand.astype(np.int64) << 40 for operand in (a, b))
        if kind.kind == "u":
            a, b = a.view(np.uint64), b.view(np.uint64)
        return ((a >> 40) * (b >> 40) >> shift).astype(kind.dtype)
    return elementwise(registers, instruction, multiply, kind, [kind, kind])


def _shift(registers, instruction):
    """Amounts of the register's width and more give 0, or copies of the sign."""
    kind, left = instruction.type, instruction.opcode == "shl"

    def shift(values, amount):
        inside = np.minimum(amount, kind.bits - 1).astype(kind.raw).view(kind.dtype)
        if left:
            return np.where(amount < kind.bits, values << inside, 0)
        shifted = values >> inside
        return shifted if kind.kind == "s" else np.where(amount < kind.bits, shifted, 0)
    return elementwise(registers, instruction, shift, kind, [kind, SHIFT])


def _funnel_shift(registers, instruction):
    """shf: 32 bits out of the 64 of (high, low) shifted."""
    left, clamp = instruction.has("l"), instruction.has("clamp")

    def shift(low, high, amount):
        both = high.astype(np.uint64) << np.uint64(32) | low
        amount = (np.minimum(amount, 32) if clamp else amount % 32).astype(np.uint64)
        return both << amount >> np.uint64(32) if left else both >> amount
    return elementwise(registers, instruction, lambda *operands: shift(*operands).astype(np.uint32), SHIFT, [SHIFT] * 3)


def _bit_field_extract(registers, instruction):
    kind = instruction.type

    def extract(values, position, length):
        wide = values.astype(np.int64 if kind.kind == "s" else np.uint64)
        length, position = (np.minimum(field & 255, 63).astype(wide.dtype) for field in (length, position))
        field = wide >> position & ((wide.dtype.type(1) << length) - wide.dtype.type(1))
        if kind.kind == "s":
            sign = np.where(length > 0, np.int64(1) << np.maximum(length - 1, 0), 0)
            field = (field ^ sign) - sign
        return field.astype(kind.dtype)
    return elementwise(registers, instruction, extract, kind, [kind, SHIFT, SHIFT])


def _bit_field_insert(registers, instruction):
    kind = instruction.type

    def insert(field, values, position, length):
        position, length = (np.minimum(amount & 255, 63).astype(np.uint64) for amount in (position, length))
        mask = ((np.uint64(1) << length) - np.uint64(1)) << position
        inserted = values.astype(np.uint64) & ~mask | field.astype(np.uint64) << position & mask
        return inserted.astype(kind.raw)
    return elementwise(registers, instruction, insert, kind, [kind, kind, SHIFT, SHIFT])


def _bits(values):
    """The bits of each value on a new last axis, the lowest first."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(values.size, -1)
    return np.unpackbits(octets, axis=1, bitorder="little")


def _population_count(values):
    return _bits(values).sum(1, dtype=np.uint32)


def _leading_zeros(values):
    bits = _bits(values)[:, ::-1]
    return np.where(bits.any(1), bits.argmax(1), bits.shape[1]).astype(np.uint32)


def _reversed_bits(values):
    return np.packbits(_bits(values)[:, ::-1], axis=1, bitorder="little").view(values.dtype)[:, 0]


def _highest_bit(registers, instruction):
    """bfind: the place of the highest bit that is not the sign's, counted from below or, by .shiftamt, from above."""
    kind, from_above = instruction.type, instruction.has("shiftamt")

    def find(values):
        magnitude = np.where(values < 0, ~values, values).astype(kind.raw)
        zeros = _leading_zeros(magnitude)
        place = zeros if from_above else np.uint32(kind.bits - 1) - zeros
        return np.where(magnitude == 0, np.uint32(0xFFFFFFFF), place)
    return elementwise(registers, instruction, find, SHIFT, [kind])


def _byte_products(registers, instruction):
    """dp4a: four products of bytes, summed and added to the third operand."""
    left, right = instruction.types[-2:]
    signed = "s" in (left.kind, right.kind)

    def multiply(a, b, c):
        a, b = (np.ascontiguousarray(words).view(f"{'i' if kind.kind == 's' else 'u'}1").reshape(-1, 4).astype(np.int64)
                for words, kind in ((a, left), (b, right)))
        return ((a * b).sum(1) + c).astype(np.int32 if signed else np.uint32)
    return elementwise(registers, instruction, multiply, Type("s" if signed else "u", 32), [SHIFT] * 3)


def _counting(function):
    def build(registers, instruction):
        return elementwise(registers, instruction, function, SHIFT, [instruction.type])
    return build


def _lookup(registers, instruction):
    """lop3: any function of three bits, given by its table."""
    kind, table = instruction.type, int(instruction.operands[4], 0)
    instruction = dataclasses.replace(instruction, operands=instruction.operands[:4])

    def combine(a, b, c):
        result = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result
    return elementwise(registers, instruction, combine, kind, [kind] * 3)


def _permute(registers, instruction):
    """prmt: four bytes picked out of eight; a selector's top bit asks for copies of the byte's sign instead."""
    if instruction.modifiers != ("b32",):
        raise PtxError(f"mode not modelled: {instruction.text}")

    def permute(low, high, selectors):
        both = high.astype(np.uint64) << np.uint64(32) | low
        result = np.zeros(both.shape, np.uint32)
        for place in range(4):
            selector = (selectors >> np.uint32(4 * place)).astype(np.uint64)
            byte = both >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            signs = np.where(byte & np.uint64(0x80), 0xFF, 0)
            byte = np.where(selector & np.uint64(8), signs, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * place)
        return result
    return elementwise(registers, instruction, permute, SHIFT, [SHIFT] * 3)


def _compare(registers, instruction):
    """setp: comparison, optionally combined with a predicate; the second destination gets the opposite."""
    comparison, *rest = instruction.modifiers
    if instruction.has(*PACKED):
        raise PtxError(f"comparison not modelled: {instruction.text}")
    read = registers.sources(instruction.operands[1:3], instruction.type)
    compare = _comparison(comparison, instruction.type.dtype in WIDER)
    logic = next((LOGIC[name] for name in rest if name in LOGIC), None)
    other = registers.source(instruction.operands[3], PREDICATE) if logic else None
    writers = registers.writers(instruction.operands[0].split("|"), PREDICATE)

    def execute(active):
        result = compare(*[operand() for operand in read])
        combined = [logic(value, other()) if logic else value for value in (result, ~result)]
        for write, value in zip(writers, combined):
            write(value, active)
    return execute


def _compare_to_number(registers, instruction):
    """set: 1 in floating point, every bit in an integer where the comparison holds."""
    if len(instruction.modifiers) != 3 or instruction.has(*PACKED):
        raise PtxError(f"comparison not modelled: {instruction.text}")
    result, kind = instruction.types
    compare = _comparison(instruction.modifiers[0], kind.dtype in WIDER)
    true = 1 if result.dtype in WIDER else -1
    return elementwise(registers, instruction, lambda a, b: np.where(compare(a, b), true, 0).astype(result.dtype), result,
                       [kind, kind])


def _comparison(name, floating):
    if name in COMPARISONS and not (floating and name == "ne"):
        return COMPARISONS[name]
    if not floating or name.removesuffix("u") not in ORDERED | {"num": None, "nan": None}:
        raise PtxError(f"comparison not modelled: {name}")
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    ordered = ORDERED[name.removesuffix("u")]
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


def _select(registers, instruction):
    kind = instruction.type
    return elementwise(registers, instruction, lambda a, b, which: np.where(which, a, b), kind, [kind, kind, PREDICATE])


def _move(registers, instruction):
    destination, source = instruction.operands
    kind = instruction.type
    if source.startswith("{"):
        return _join(registers, destination, vector(source), kind)
    if destination.startswith("{"):
        return _split(registers, vector(destination), source, kind)
    return elementwise(registers, instruction, lambda value: value, kind, [kind])


def _create_policy(registers, instruction):
    """createpolicy: a hint to the caches, which stand for nothing here."""
    write = registers.writer(instruction.operands[0], Type("b", 64))
    return lambda active: write(np.zeros(registers.threads, np.uint64), active)


def _join(registers, destination, parts, kind):
    part = Type("b", kind.bits // len(parts))
    read, write = registers.sources(parts, part), registers.writer(destination, kind)

    def execute(active):
        write(np.stack([operand() for operand in read], 1).view(kind.raw)[:, 0].view(kind.dtype), active)
    return execute


def _split(registers, parts, source, kind):
    part = Type("b", kind.bits // len(parts))
    read, writers = registers.source(source, kind), registers.writers(parts, part)

    def execute(active):
        pieces = np.array(read()).view(part.raw).reshape(-1, len(parts))
        for number, write in enumerate(writers):
            write(pieces[:, number], active)
    return execute


ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
           "ne": np.not_equal}
COMPARISONS = {**ORDERED, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
BUILDERS = {
    "add": arithmetic(np.add, np.add), "sub": arithmetic(np.subtract, np.subtract), "mul": _product, "mad": _product,
    "mul24": _product_of_24_bits, "div": arithmetic(np.divide, _divide), "rem": arithmetic(None, _remainder),
    "fma": arithmetic(_fused_multiply_add, None), "neg": arithmetic(np.negative, np.negative),
    "abs": arithmetic(np.abs, np.abs), "min": _extremum(np.fmin, np.minimum), "max": _extremum(np.fmax, np.maximum),
    "copysign": arithmetic(lambda sign, size: np.copysign(size, sign), None),
    "and": arithmetic(None, np.bitwise_and), "or": arithmetic(None, np.bitwise_or), "not": arithmetic(None, np.invert),
    "xor": arithmetic(None, np.bitwise_xor), "shl": _shift, "shr": _shift, "shf": _funnel_shift,
    "bfe": _bit_field_extract, "bfi": _bit_field_insert, "popc": _counting(_population_count),
    "clz": _counting(_leading_zeros), "brev": arithmetic(None, _reversed_bits), "lop3": _lookup, "prmt": _permute,
    "bfind": _highest_bit, "dp4a": _byte_products,
    "setp": _compare, "set": _compare_to_number, "selp": _select, "mov": _move, "createpolicy": _create_policy,
    "ex2": arithmetic(np.exp2, None), "lg2": arithmetic(np.log2, None), "rcp": arithmetic(np.reciprocal, None),
    "rsqrt": arithmetic(lambda x: 1 / np.sqrt(x), None), "sqrt": arithmetic(np.sqrt, None),
    "tanh": arithmetic(np.tanh, None), "sin": arithmetic(np.sin, None), "cos": arithmetic(np.cos, None),
}
