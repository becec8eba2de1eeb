"""The CPU in the place of a GPU for `fastgpt.LLM(device="cuda")`: its tensors, and every kernel by its simulated twin."""
import contextlib
from unittest import mock

import torch
from cuda_executors import Shim, running_cuda
from executors import Interpreter, running

from fastgpt.engine import gpu_device
from fastgpt.engine.backends import CpuBackend


class PlainDevice:
    """What `CudaDevice` is, without streams and graphs: a replay runs the captured call again, into the same result."""

    captures = replays = 0

    def __init__(self, name):
        self.torch = torch.device("cpu")

    def upload(self, array, to=None):
        return torch.from_numpy(array.copy()) if to is None else to.copy_(torch.from_numpy(array))

    def download(self, tensor):
        host = tensor.clone()  # what is there now: a replay may overwrite it
        return lambda: host.numpy()

    def turn(self):
        return contextlib.nullcontext()

    def new_pool(self):
        return None

    def capture(self, forward, pool):
        result = forward()
        PlainDevice.captures += 1

        def replay():
            PlainDevice.replays += 1
            result.copy_(forward())
        return result, replay

    def free_memory(self):
        return 2 ** 24


@contextlib.contextmanager
def plain_gpu(cuda=None, triton=None):
    """Within this context device="cuda" means the CPU's tensors; `cuda` and `triton` run the kernels."""
    before, gpu_device.CudaDevice = gpu_device.CudaDevice, PlainDevice
    PlainDevice.captures = PlainDevice.replays = 0
    try:
        # `running` asks for Triton; the CPU's engine, which is the truth here, would refuse to run beside that.
        with running_cuda(cuda or Shim()), running(triton or Interpreter()), mock.patch.object(
                CpuBackend, "kernels", ("cpp", "triton")):
            yield PlainDevice
    finally:
        gpu_device.CudaDevice = before
