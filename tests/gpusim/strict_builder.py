"""Triton's interpreter with the hardware's numbers and with checks of memory.

Triton's own does bfloat16 arithmetic on the bit patterns, truncates in conversions to bfloat16, takes tf32 for float32,
and gives 0 for lanes that a load leaves undefined. This reaches into private interfaces of triton.
"""
import dataclasses

import numpy as np
import triton.language as tl
from number_formats import bfloat16_to_float32, float32_to_bfloat16, round_to_tf32, truncate_to_tf32
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

POISONED_BFLOAT16, POISONED_BYTE, POISONED_INTEGER = 0x7FC1, 0x7F, 0x5A5B
DOT_TYPES = (tl.float16, tl.bfloat16, tl.float32)
NEAREST_EVEN = (None, ir.ROUNDING_MODE.RTNE)


class StrictBuilder(InterpreterBuilder):
    """Runs a program's operations on numpy arrays. memory: the checks of the launch under way, or None."""

    def __init__(self):
        super().__init__()
        # Kernels rely on unsigned wrap-around; and the overflow checks cost more than all the rest.
        self.options = dataclasses.replace(self.options, sanitize_overflow=False)
        self.memory, self.poison = None, True

    def binary_op(self, lhs, rhs, op):
        return _in_float32(super().binary_op, lhs, rhs, op)

    def unary_op(self, arg, op):
        return _in_float32(super().unary_op, arg, op)

    def create_fma(self, x, y, z):
        return _in_float32(super().create_fma, x, y, z)

    def create_clampf(self, arg, low, high, propagate_nans):
        return _in_float32(super().create_clampf, arg, low, high, propagate_nans)

    def create_rsqrt(self, arg):
        return _in_float32(super().create_rsqrt, arg)

    def create_erf(self, arg):
        return _in_float32(super().create_erf, arg)

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if is_bfloat16(src):
            src = widened(src)
        if target == tl.bfloat16:
            return to_bfloat16(src.data.astype(np.float32))
        return src if target == src.dtype.scalar else super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        wide = min(src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth) >= 16
        if wide and rounding_mode in NEAREST_EVEN:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar not in DOT_TYPES:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        left, right = widened(a).data, widened(b).data
        if a.dtype.scalar != tl.float32:
            product = left.astype(np.float32) @ right.astype(np.float32)
        else:
            product = _float32_dot(left, right, input_precision)
        total = TensorHandle(product + widened(d).data, tl.float32)
        return self.cast_impl(total, d.dtype)

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        if self.memory:
            element = ptrs.get_element_ty()
            kind = _get_np_dtype(element)
            lanes = np.broadcast_to(mask.data, ptrs.data.shape)
            self.memory.load(ptrs.data, None if lanes.all() else lanes, kind.itemsize)
            if other is None and self.poison:
                other = _poisoned(ptrs.data.shape, element, kind)
        return super().create_masked_load(ptrs, mask, other, cache_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        if self.memory:
            lanes = np.broadcast_to(mask.data, ptrs.data.shape)
            self.memory.store(ptrs.data, None if lanes.all() else lanes, value.data.dtype.itemsize)
        return super().create_masked_store(ptrs, value, mask, cache_policy)

    def create_atomic_rmw(self, rmw_op, ptr, val, mask, sem, scope):
        lanes = np.broadcast_to(mask.data, ptr.data.shape)
        if self.memory:
            self.memory.atomic(ptr.data, lanes, val.data.dtype.itemsize)
        if not is_bfloat16(val):
            return super().create_atomic_rmw(rmw_op, ptr, val, mask, sem, scope)
        if rmw_op not in (ir.ATOMIC_OP.FADD, ir.ATOMIC_OP.ADD):
            raise NotImplementedError(f"atomic {rmw_op} of bfloat16")
        return self._atomic_add_bfloat16(ptr, val, lanes)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        if self.memory:
            self.memory.atomic(ptr.data, None, val.data.dtype.itemsize)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def _atomic_add_bfloat16(self, ptr, val, lanes):
        """Triton's interpreter has none: one lane after another, past the checks of plain accesses."""
        before = np.zeros(ptr.data.shape, np.uint16)
        values = np.broadcast_to(widened(val).data, ptr.data.shape)
        one_lane = TensorHandle(np.ones(1, bool), tl.int1)
        for lane in zip(*np.nonzero(lanes)):
            pointer = TensorHandle(ptr.data[lane].reshape(1), ptr.dtype)
            old = super().create_masked_load(pointer, one_lane, None, None, False)
            before[lane] = old.data[0]
            super().create_masked_store(pointer, to_bfloat16(widened(old).data + values[lane]), one_lane, None)
        return TensorHandle(before, tl.bfloat16)


def is_bfloat16(operand):
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16 and operand.data.dtype == np.uint16


def widened(operand):
    """A bfloat16 handle as float32; anything else as it is."""
    if not is_bfloat16(operand):
        return operand
    return TensorHandle(bfloat16_to_float32(operand.data).reshape(operand.data.shape), tl.float32)


def to_bfloat16(values):
    return TensorHandle(float32_to_bfloat16(values).reshape(values.shape), tl.bfloat16)


def _in_float32(operation, *operands):
    """The operation, rounded once to bfloat16 if an operand was of it, as the hardware does it."""
    if not any(is_bfloat16(operand) for operand in operands):
        return operation(*operands)
    result = operation(*[widened(operand) for operand in operands])
    return to_bfloat16(result.data) if result.data.dtype == np.float32 else result


def _float32_dot(left, right, input_precision):
    """A product of float32 matrices with the parts of their elements that the tensor cores see.

    "tf32": compiled code hands over float32, whose low bits the hardware ignores. "tf32x3": each factor is the sum of
    two tf32 numbers; the product of the small parts is left out, and what infinities make of these is dropped.
    """
    if input_precision == ir.INPUT_PRECISION.IEEE:
        return left @ right
    if input_precision == ir.INPUT_PRECISION.TF32:
        return truncate_to_tf32(left) @ truncate_to_tf32(right)
    if input_precision != ir.INPUT_PRECISION.TF32x3:
        raise NotImplementedError(f"dot with {input_precision}")
    (left_big, left_small), (right_big, right_small) = _tf32_parts(left), _tf32_parts(right)
    corrections = left_small @ right_big + left_big @ right_small
    return left_big @ right_big + np.where(np.isnan(corrections), np.float32(0), corrections)


def _tf32_parts(values):
    big = round_to_tf32(values)
    return big, round_to_tf32(values - big)


def _poisoned(shape, element, kind):
    """What a masked load without `other` gives: NaN, or an integer that no kernel expects."""
    if element == tl.bfloat16:
        value = POISONED_BFLOAT16
    elif kind.kind == "f":
        value = np.nan
    else:
        value = POISONED_BYTE if kind.itemsize == 1 else POISONED_INTEGER
    return TensorHandle(np.full(shape, value, kind), element)
