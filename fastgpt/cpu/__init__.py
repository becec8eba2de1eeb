"""The C++ kernels for the CPU behind `fastgpt.ops`: one file an op, in the order launchers, op definitions, function."""
from fastgpt.autograd.tensors import MAX_HEAD_SIZE
from fastgpt.cpu.attention import attention, attention_weights, packed_attention
from fastgpt.cpu.cross_entropy import cross_entropy
from fastgpt.cpu.gelu import bias_gelu, gelu
from fastgpt.cpu.launch import DTYPES
from fastgpt.cpu.layer_norm import add_layer_norm, layer_norm
from fastgpt.cpu.linear import linear
from fastgpt.cpu.paged import paged_attention, store_kv
from fastgpt.extension import CACHE_DTYPES, KEY_LANES, MISSING

KERNELS = {"gelu": gelu, "bias_gelu": bias_gelu, "layer_norm": layer_norm, "add_layer_norm": add_layer_norm,
           "linear": linear, "attention": attention, "packed_attention": packed_attention, "cross_entropy": cross_entropy,
           "store_kv": store_kv, "paged_attention": paged_attention, "attention_weights": attention_weights}


def why_not(op, device, *tensors, window=None, dropout_p=0.0, cache=None):
    """Why these kernels can't answer a call, or None. Of attention, q comes first."""
    if MISSING:
        return MISSING
    if op not in KERNELS:
        return f"{op} has no C++ kernel"
    if device != "cpu":
        return f"the C++ kernels are for the CPU, not for {device}"
    if cache is not None and (cache.lanes != KEY_LANES or str(cache.v.dtype).removeprefix("torch.") not in CACHE_DTYPES):
        return f"the C++ kernels take caches of {', '.join(CACHE_DTYPES)} with {KEY_LANES} keys side by side"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"the C++ kernels take float32 and bfloat16, not {tensor.dtype}"
    if window is not None:
        return "the C++ attention has no sliding window"
    if op == "packed_attention" and dropout_p:
        return "the C++ attention of packed sequences has no dropout"
    if op in ("attention", "packed_attention") and tensors and tensors[0].shape[-1] > MAX_HEAD_SIZE:
        return f"the C++ attention takes head sizes up to {MAX_HEAD_SIZE}, not {tensors[0].shape[-1]}"
    return None
