"""Triton kernels for NVIDIA GPUs from Ampere on behind `fastgpt.ops`: one file an op, in the order kernels, launchers, op.

They are imported where PyTorch finds a GPU and triton is installed, so that elsewhere nothing of it loads.
"""
import importlib.util

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
MAX_COLUMNS = 8192  # of a row that a norm's backward holds in registers
MIN_CAPABILITY = (8, 0)
KERNELS = {}  # op -> function, once `load` has run
MODULES = []  # those with kernels, likewise
devices = ["cuda"]


def _missing():
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'fastgpt[gpu]'"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "the Triton kernels need compute capability 8.0, the device has {}.{}".format(*capability)
    return None


MISSING = _missing()


def load():
    """Imports the kernels, and with them triton."""
    from fastgpt.kernels import attention, attention_backward, cross_entropy, gelu, layer_norm, linear, reduce
    MODULES[:] = [attention, attention_backward, cross_entropy, gelu, layer_norm, reduce]
    KERNELS.update(layer_norm=layer_norm.layer_norm, add_layer_norm=layer_norm.add_layer_norm, gelu=gelu.gelu,
                   bias_gelu=gelu.bias_gelu, linear=linear.linear, attention=attention.attention,
                   packed_attention=attention.packed_attention, cross_entropy=cross_entropy.cross_entropy)


def why_not(op, device, *tensors, window=None, dropout_p=0.0):
    """Why these kernels can't answer a call, or None. Of attention, q comes first."""
    if device not in devices:
        return f"the Triton kernels are for {devices[0]}, not for {device}"
    if MISSING:
        return MISSING
    if op not in KERNELS:
        return f"{op} has no Triton kernel"
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"the Triton kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    if op in ("attention", "packed_attention") and tensors and tensors[0].shape[-1] > MAX_HEAD_SIZE:
        return f"the Triton attention takes head sizes up to {MAX_HEAD_SIZE}, not {tensors[0].shape[-1]}"
    if op in ("layer_norm", "add_layer_norm") and tensors and tensors[0].shape[-1] > MAX_COLUMNS:
        return f"the Triton layer norm takes rows of up to {MAX_COLUMNS}, not {tensors[0].shape[-1]}"
    return None


if MISSING is None:
    load()
