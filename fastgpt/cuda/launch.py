"""What the CUDA kernels are started with: tests put a module that runs them on the CPU in its place."""
import torch

from fastgpt.extension import _C
from fastgpt.kernels import launch as kernels_launch

# csrc/cuda/kernels.h's numbers.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}


class OnDevice:
    """The extension's launchers, on the current stream of a GPU."""

    library = getattr(_C, "cuda", None)

    @staticmethod
    def stream(device):
        return torch.cuda.current_stream(device).cuda_stream

    processors = staticmethod(kernels_launch.OnDevice.processors)


executor = OnDevice


def run(name, device, *arguments):
    """Calls a launcher of csrc/cuda/kernels.h with its arguments and the stream."""
    stream = executor.stream(device)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            getattr(executor.library, name)(*arguments, stream)
    else:
        getattr(executor.library, name)(*arguments, stream)


def upload(array, device, to=None):
    """A numpy array as a tensor on the device, in `to` if that is given, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True) if to is None else to.copy_(tensor, non_blocking=True)


def rows(tensor):
    """csrc/cuda/kernels.h's Rows of a tensor whose rows are contiguous."""
    return DTYPES[tensor.dtype], tensor.data_ptr(), tensor.stride(0)


def pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()
