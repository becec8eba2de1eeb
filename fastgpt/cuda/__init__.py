"""The CUDA kernels of csrc/cuda for decoding: the paged KV cache, weights of few bits, sampling. One file a kernel.

No GPU is touched before the first call with a CUDA tensor.
"""
import functools

import torch

from fastgpt.autograd.tensors import MAX_HEAD_SIZE
from fastgpt.cuda import launch
from fastgpt.cuda.paged import paged_attention, store_kv
from fastgpt.extension import _C, MISSING

KERNELS = {"store_kv": store_kv, "paged_attention": paged_attention}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (7, 5)
devices = ["cuda"]


def missing(index):
    """Why the kernels can't run on the GPU of this index (None: the current one), or None."""
    if launch.executor.library is None:
        return MISSING or ("this build of the extension has no CUDA part: install it again with FASTGPT_BUILD=cuda where nvcc "
                           "is")
    return _missing_device(index)


@functools.lru_cache
def _missing_device(index):
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    reason = _C.cuda_devices()[1]
    if reason:  # its CUDA runtime is not PyTorch's, and may want a newer driver
        return reason
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return "the CUDA kernels need compute capability 7.5, the device has {}.{}".format(*capability)
    return None


def why_not(op, device, *tensors, cache=None, **options):
    """Why these kernels can't answer a call, or None."""
    if op not in KERNELS:
        return f"{op} has no CUDA kernel"
    if device not in devices:
        return f"the CUDA kernels are for {devices[0]}, not for {device}"
    reason = missing(tensors[0].device.index if tensors else None)
    if reason:
        return reason
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"the CUDA kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    if cache is not None and (cache.lanes != 1 or cache.v.dtype not in launch.DTYPES):
        return f"the CUDA kernels take a cache of row by row keys, not of {cache.lanes} side by side in {cache.v.dtype}"
    if tensors and tensors[0].shape[-1] > MAX_HEAD_SIZE:
        return f"the CUDA kernels take head sizes up to {MAX_HEAD_SIZE}, not {tensors[0].shape[-1]}"
    return None
