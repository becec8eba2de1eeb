"""Runs the PTX that nvcc makes of csrc/cuda, launched as the launchers of csrc/cuda launch it."""
import contextlib
from unittest import mock

import cuda_shim
import nvcc
import torch
from cuda_executors import running_cuda
from ptx_machine import Kernel


class LaunchedElsewhere:
    """An executor of fastgpt.cuda.launch whose launchers' launches go to launch(symbol, grid, block, shared, arguments)."""

    def __init__(self, processors=2):
        self.module, self.count = cuda_shim.shim(), processors

    @property
    def library(self):
        return self

    def __getattr__(self, name):
        def call(*arguments):
            with cuda_shim.launches(self.module, self.launch):
                return getattr(self.module, name)(*arguments)
        return call

    def stream(self, device):
        return 0

    def processors(self, device):
        return self.count


class CudaMachineCode(LaunchedElsewhere):
    """Executes the PTX for an architecture. edit: a change of the text, given the kernel's symbol and that.

    tensors: those that the kernels may access, as bytes, by address and length. Every tensor whose address is asked for
    within `running_machine_code` is one of them from then on.
    """

    def __init__(self, arch, processors=2, edit=None):
        super().__init__(processors)
        self.arch, self.edit, self.tensors = arch, edit or (lambda symbol, ptx: ptx), {}

    def launch(self, symbol, grid, block, shared, arguments):
        ptx = self.edit(symbol, nvcc.find(symbol, self.arch))
        Kernel(ptx, symbol, self.tensors.values()).launch(grid, block, arguments, shared=shared)


class CudaRecorder(LaunchedElsewhere):
    """Runs nothing and notes every launch: (symbol, grid, block, shared bytes, arguments' bytes)."""

    def __init__(self, processors=132):
        super().__init__(processors)
        self.launches = []

    def launch(self, *launched):
        self.launches.append(launched)


def octets_of(tensor):
    """The bytes from a tensor's first element to its last, and what fills them up to 16: the padding of a cache's rows."""
    size, storage = tensor.element_size(), tensor.untyped_storage()
    reach = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride()))
    first = tensor.storage_offset() * size
    end = -(-(first + (reach + 1) * size) // 16) * 16
    return torch.tensor([], dtype=torch.uint8).set_(storage, first, (min(end, storage.nbytes()) - first,))


@contextlib.contextmanager
def running_machine_code(arch, **options):
    """Within this context the CUDA kernels answer every op by their PTX for an architecture, for tensors on the CPU."""
    executor = CudaMachineCode(arch, **options)

    def remembering(tensor):
        address = torch._C.TensorBase.data_ptr(tensor)
        if tensor.numel():
            octets = octets_of(tensor)
            executor.tensors[address, len(octets)] = octets
        return address

    with mock.patch.object(torch.Tensor, "data_ptr", remembering), running_cuda(executor):
        yield executor
