"""What takes the GPU's place behind `fastgpt.cuda.launch`: the CUDA sources on the CPU. `running_cuda(executor)` puts it
there."""
import contextlib

import cuda_shim
import torch
from answering import answering

from fastgpt import cuda
from fastgpt.cuda import launch


class Shim:
    """Runs kernels thread by thread: order "fifo" or "rand:SEED" of the threads of a block and of the blocks; copies
    "late", when they are waited for, or "early", at once."""

    def __init__(self, order="fifo", copies="late", processors=2, module=None):
        kind, _, seed = order.partition(":")
        if kind not in ("fifo", "rand") or copies not in ("late", "early"):
            raise ValueError(f"Shim({order!r}, {copies!r}): expected fifo or rand:SEED, and late or early")
        self.module = module or cuda_shim.shim()
        self.random, self.seed, self.early, self.count = kind == "rand", int(seed or 0), copies == "early", processors

    @property
    def library(self):
        self.module.set_order(self.random, self.seed)
        self.module.set_copies_early(self.early)
        return self.module

    def stream(self, device):
        return 0

    def processors(self, device):
        return self.count


class Gpu(launch.OnDevice):
    """The GPU itself. count: the processors that launchers are told of, None for its own."""

    count = None

    def processors(self, device):
        return self.count or launch.OnDevice.processors(device)


@contextlib.contextmanager
def on_gpu():
    """Within this context the CUDA kernels answer every op on a GPU, where new tensors are."""
    with torch.device("cuda"), running_cuda(Gpu(), "cuda") as executor:
        yield executor


def running_cuda(executor, device="cpu"):
    """Within this context the CUDA kernels answer every op, for tensors of `device`, and `executor` runs them."""
    return answering(cuda, "cuda", executor, device)
