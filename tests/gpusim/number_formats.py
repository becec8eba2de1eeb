"""Number formats that numpy does not have: bfloat16 (as its 16 bits) and tf32 (as the float32 that it is a part of)."""
import numpy as np

BFLOAT16_NAN = np.uint16(0x7FFF)
TF32_MASK = np.uint32(0xFFFFE000)


def bfloat16_to_float32(bits):
    """The float32 values of an array of bfloat16 bit patterns (uint16)."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values):
    """The bfloat16 bit patterns nearest to float32 values, ties to even, as the hardware's conversion rounds."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    ties_to_even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + ties_to_even) >> np.uint32(16)
    return np.where(np.isnan(values), BFLOAT16_NAN, rounded.astype(np.uint16))


def round_to_tf32(values):
    """float32 values rounded to tf32's 10 bits of fraction, ties away from zero: cvt.rna.tf32.f32."""
    values = np.ascontiguousarray(values, np.float32)
    rounded = (values.view(np.uint32) + np.uint32(0x1000)) & TF32_MASK
    return np.where(np.isnan(values), values, rounded.view(np.float32))


def truncate_to_tf32(values):
    """float32 values without the 13 bits that a matrix instruction of type tf32 does not look at."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & TF32_MASK).view(np.float32)
