"""AddressSanitizer and ThreadSanitizer over launches of the CUDA kernels on the CPU, in a process of their own.

`with captured() as calls:` notes the launchers' calls within, `call(...)` makes one by hand, and `sanitize(kind, calls)`
raises AssertionError with what the sanitizer reports: an access outside the tensors or shared arrays ("address"), or a
race between the threads of a block ("thread").
"""
import contextlib
import ctypes
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import cuda_shim
import torch
from cuda_executors import Shim, running_cuda
from cuda_module import Call, Pointer

RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
REPORTED = 6000  # characters
LEAST_ADDRESS = 2 ** 32  # a whole number from here on is one


@functools.cache
def preloaded(kind):
    """What the process must load first: the sanitizer, and the C++ library whose exceptions it watches; or None."""
    names = RUNTIMES[kind], "libstdc++.so.6"
    paths = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
             for name in names]
    return ":".join(paths) if all(map(os.path.isabs, paths)) else None


def missing(kind):
    """Why the sanitizer can't run, or None."""
    return cuda_shim.missing() or (None if preloaded(kind) else f"the compiler has no {RUNTIMES[kind]}")


def sanitize(kind, calls, sources=None):
    """Makes the calls in a module of the sources (default: csrc/cuda) built for the sanitizer, in every order."""
    path = cuda_shim.build(kind, sources)
    with tempfile.NamedTemporaryFile() as file:
        pickle.dump(calls, file)
        file.flush()
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("cuda_sanitized.py")), str(path), file.name],
            capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, "LD_PRELOAD": preloaded(kind), "ASAN_OPTIONS": "detect_leaks=0",
                 "TSAN_OPTIONS": "halt_on_error=1"})
    lines = result.stdout.splitlines() or [""]
    if result.returncode or lines[-1] != "clean":
        raise AssertionError(f"{kind}: {lines[-1]}\n{result.stderr[:REPORTED]}")


def call(name, *arguments):
    """A launcher's call by hand; tensors stand for their addresses."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    blocks = {tensor.data_ptr(): block_of(tensor) for tensor in tensors}
    return noted(name, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments], blocks)


@contextlib.contextmanager
def captured():
    """Within this context the CUDA kernels run in the shim; gives the list of their calls."""
    executor = _Capture()
    with mock.patch.object(torch.Tensor, "data_ptr", lambda tensor: executor.remembering(tensor)), running_cuda(executor):
        yield executor.calls


class _Capture(Shim):
    """Every tensor whose address is asked for is what a launcher may be given; the largest at an address."""

    def __init__(self):
        super().__init__()
        self.calls, self.blocks, self.tensors = [], {}, []

    def remembering(self, tensor):
        address, bytes_there = block_of(tensor)
        self.tensors.append(tensor)  # so that no other tensor comes to lie there
        self.blocks[address] = max(self.blocks.get(address, (0, 0)), (address, bytes_there))
        return address

    @property
    def library(self):
        return _Noting(super().library, self)


class _Noting:
    """A module whose functions' calls are noted."""

    def __init__(self, module, capture):
        self.module, self.capture = module, capture

    def __getattr__(self, name):
        def function(*arguments):
            self.capture.calls.append(noted(name, arguments, self.capture.blocks))
            return getattr(self.module, name)(*arguments)
        return function


def noted(name, arguments, blocks):
    """The Call of these arguments; blocks: {address: (address, bytes)} of what they may point into."""
    used = []

    def stored(argument):
        if isinstance(argument, (tuple, list)):
            return tuple(map(stored, argument))
        if not isinstance(argument, int) or argument < LEAST_ADDRESS:
            return argument
        if argument not in blocks:
            raise LookupError(f"{name}: {argument:#x} is not the address of a tensor")
        if blocks[argument] not in used:
            used.append(blocks[argument])
        return Pointer(used.index(blocks[argument]))

    stored_arguments = stored(arguments)
    return Call(name, stored_arguments, [(ctypes.string_at(*block), block[0] % 16) for block in used])


def block_of(tensor):
    """(address, bytes up to a tensor's last element and what fills them up to 16: the padding of a cache's rows)."""
    address, storage = torch._C.TensorBase.data_ptr(tensor), tensor.untyped_storage()
    if not tensor.numel():
        return address, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    behind = storage.data_ptr() + storage.nbytes() - address
    return address, min(-(-reach * tensor.itemsize // 16) * 16, behind)
