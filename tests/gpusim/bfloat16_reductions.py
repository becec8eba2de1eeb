"""Reductions and scans of bfloat16, whose bit patterns triton's interpreter adds up and compares as integers."""
import triton.language as tl
from strict_builder import is_bfloat16, to_bfloat16, widened

# What triton's interpreter leaves to numpy; it runs any other function element by element, and that is right.
BY_NUMPY = (tl.standard._sum_combine, tl.standard._prod_combine, tl.standard._elementwise_max,
            tl.standard._elementwise_min, tl.standard._argmax_combine_tie_break_left,
            tl.standard._argmax_combine_tie_break_fast, tl.standard._argmin_combine_tie_break_left,
            tl.standard._argmin_combine_tie_break_fast)


def in_float32(apply_impl):
    """apply_impl of a reduction or scan, done in float32 and rounded at its end."""
    def apply(self, inputs):
        narrow = [is_bfloat16(tensor.handle) for tensor in inputs]
        if not any(narrow) or self.combine_fn not in BY_NUMPY:
            return apply_impl(self, inputs)
        results = apply_impl(self, tuple(_tensor(widened(t.handle), t.shape, t.dtype) for t in inputs))
        results = results if isinstance(results, (tuple, list)) else [results]
        return [_tensor(to_bfloat16(result.handle.data), result.shape, tl.bfloat16) if was else result
                for result, was in zip(results, narrow)]
    return apply


def _tensor(handle, shape, dtype):
    dtype = tl.float32 if dtype == tl.bfloat16 and not is_bfloat16(handle) else dtype
    return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)
