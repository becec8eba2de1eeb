"""PTX conversions: cvt between number formats, cvta between address windows."""
import numpy as np
import torch
from number_formats import float32_to_bfloat16, round_to_tf32
from ptx_memory import SHARED_WINDOW
from ptx_operands import ADDRESS
from ptx_parser import PtxError, Type
from ptx_scalar import elementwise

FLOAT32 = Type("f", 32)
TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
BYTE_FLOATS = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}
NOT_MODELLED = ("rz", "rm", "rp", "rs", "pack", "satfinite")


def _convert(registers, instruction):
    if instruction.has(*BYTE_FLOATS):
        return _byte_pair(registers, instruction)
    if instruction.has(*NOT_MODELLED) or len(instruction.types) != 2:
        raise PtxError(f"conversion not modelled: {instruction.text}")
    result, source = instruction.types
    if instruction.has("f16x2", "bf16x2"):
        return _pair(registers, instruction)
    if result.kind == "tf32":
        return elementwise(registers, instruction, _to_tf32(instruction), result, [FLOAT32])
    is_float = np.dtype(result.dtype).kind == "f"
    function = _to_float(instruction, result) if is_float else _to_integer(instruction, result, source)
    return elementwise(registers, instruction, function, result, [source])


def _pair(registers, instruction):
    """Two float32 numbers to a register, the first operand in its upper half."""
    bfloat16 = instruction.has("bf16x2")

    def encode(values):
        values = np.maximum(values, 0) if instruction.has("relu") else values
        return float32_to_bfloat16(values) if bfloat16 else values.astype(np.float16).view(np.uint16)

    def convert(high, low):
        return encode(high).astype(np.uint32) << np.uint32(16) | encode(low)
    return elementwise(registers, instruction, convert, Type("b", 32), [FLOAT32, FLOAT32])


def _byte_pair(registers, instruction):
    """Two numbers of 8 bits, from two of float32 or of float16, of which the first is the upper one; or to float16."""
    name = next(modifier for modifier in instruction.modifiers if modifier in BYTE_FLOATS)
    element = BYTE_FLOATS[name]
    packed, two = Type("b", 16), Type("b", 32)
    if instruction.modifiers[-1] == name:
        def widen(values):
            numbers = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).view(element)
            return numbers.half().numpy().view(np.uint32)
        return elementwise(registers, instruction, widen, two, [packed])
    if instruction.modifiers[:3] != ("rn", "satfinite", name) or instruction.has("relu"):
        raise PtxError(f"conversion not modelled: {instruction.text}")

    def narrow(*values):
        numbers = np.stack(values[::-1], 1) if len(values) == 2 else values[0].view(np.float16).astype(np.float32)
        numbers = torch.from_numpy(np.ascontiguousarray(numbers)).clamp(-torch.finfo(element).max, torch.finfo(element).max)
        return numbers.to(element).view(torch.uint8).numpy().view(np.uint16).ravel()
    sources = [FLOAT32, FLOAT32] if instruction.modifiers[-1] == "f32" else [two]
    return elementwise(registers, instruction, narrow, packed, sources)


def _to_tf32(instruction):
    if not instruction.has("rna"):
        raise PtxError(f"rounding not modelled: {instruction.text}")
    return round_to_tf32


def _to_float(instruction, result):
    integral = _integral_rounding(instruction)
    relu = instruction.has("relu")

    def convert(values):
        values = integral(values) if integral else values
        values = values.astype(result.dtype)
        values = np.maximum(values, 0) if relu else values
        return np.nan_to_num(np.clip(values, 0, 1)) if instruction.has("sat") else values
    return convert


def _to_integer(instruction, result, source):
    """From floating point: rounded, NaN to 0, and always saturating; from integers: cut off unless .sat."""
    limits = np.iinfo(result.dtype)
    if np.dtype(source.dtype).kind == "f":
        rounding = _integral_rounding(instruction) or np.trunc
        return lambda values: _saturated(np.nan_to_num(rounding(values.astype(np.float64))), limits)
    if instruction.has("sat"):
        return lambda values: np.clip(values.astype(object), limits.min, limits.max).astype(result.dtype)
    return lambda values: values.astype(result.dtype)


def _saturated(values, limits):
    """float64 does not hold the largest 64-bit integers, so these are put in after the conversion."""
    inside = values.clip(limits.min, np.nextafter(float(limits.max) + 1, 0))
    converted = inside.astype(limits.dtype)
    return np.where(values >= float(limits.max), limits.dtype.type(limits.max), converted)


def _integral_rounding(instruction):
    return next((TO_INTEGRAL[name] for name in instruction.modifiers if name in TO_INTEGRAL), None)


def _convert_address(registers, instruction):
    """Generic addresses of shared memory lie in a window of their own; those of global memory are the same."""
    window = SHARED_WINDOW if instruction.has("shared") else np.uint64(0)
    to_space = instruction.has("to")
    move = (lambda address: address - window) if to_space else (lambda address: address + window)
    return elementwise(registers, instruction, move, ADDRESS, [ADDRESS])


BUILDERS = {"cvt": _convert, "cvta": _convert_address}
