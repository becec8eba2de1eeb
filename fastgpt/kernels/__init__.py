"""Triton kernels for NVIDIA GPUs from Ampere on behind `fastgpt.ops`: one file an op, in the order kernels, launchers, op.

Neither CUDA nor triton is touched before the first call with a CUDA tensor.
"""
import functools
import importlib.util

import torch

from fastgpt.autograd.tensors import MAX_HEAD_SIZE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
KERNELS = {}  # op -> function, once `load` has run
MODULES = []  # those with kernels, likewise
devices = ["cuda"]


def missing(index):
    """Why the kernels can't run on the GPU of this index (None: the current one), or None. Imports them."""
    return _missing(index)


# A compiler asks once and does not look inside: torch.compiler.assume_constant_result, which would import half of torch.
missing._dynamo_marked_constant = True


@functools.lru_cache
def _missing(index):
    if torch.version.hip:
        return "they were written for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'fastgpt[gpu]'"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return "the Triton kernels need compute capability 8.0, the device has {}.{}".format(*capability)
    try:
        load()
    except ImportError as error:
        return f"triton can't be imported ({error})"
    return None


def load():
    """Imports the kernels, and with them triton."""
    from fastgpt.kernels import (
        attention,
        attention_backward,
        attention_weights,
        cross_entropy,
        gelu,
        layer_norm,
        linear,
        paged_attention,
        reduce,
    )
    MODULES[:] = [attention, attention_backward, attention_weights, cross_entropy, gelu, layer_norm, paged_attention, reduce]
    KERNELS.update(layer_norm=layer_norm.layer_norm, add_layer_norm=layer_norm.add_layer_norm, gelu=gelu.gelu,
                   bias_gelu=gelu.bias_gelu, linear=linear.linear, attention=attention.attention,
                   packed_attention=attention.packed_attention, cross_entropy=cross_entropy.cross_entropy,
                   attention_weights=attention_weights.attention_weights)


def why_not(op, device, *tensors, **options):
    """Why these kernels can't answer a call, or None; they know all options. Of attention, q comes first."""
    if device not in devices:
        return f"the Triton kernels are for {devices[0]}, not for {device}"
    reason = missing(tensors[0].device.index if tensors else None)
    if reason:
        return reason
    if op not in KERNELS:
        return f"{op} has no Triton kernel"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    if op in ("attention", "packed_attention") and tensors and tensors[0].shape[-1] > MAX_HEAD_SIZE:
        return f"the Triton attention takes head sizes up to {MAX_HEAD_SIZE}, not {tensors[0].shape[-1]}"
    return None
