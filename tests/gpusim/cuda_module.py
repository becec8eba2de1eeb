"""The module that cuda_shim builds, and calls of it that can be stored: all that a process under a sanitizer needs."""
import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


def load(path):
    """Each file is a module of its own: pybind11 knows them by their full names."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}.fastgpt_cusim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for symbol, offset, size in static_shared(path):
        module.add_static_shared(symbol, offset, size)
    return module


def static_shared(path):
    """(the function's symbol, offset, bytes) of the arrays that are local to a function: a kernel's __shared__ ones."""
    table = subprocess.run(["nm", "-S", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) (\w+) [bBdDvVuU] _Z(Z\w+)E\d+[A-Za-z_]\w*$", table, re.MULTILINE)
    return [("_Z" + function[1:], int(offset, 16), int(size, 16)) for offset, size, function in found]


@dataclass
class Call:
    """A launcher's name and its arguments: numbers, texts, tuples of them, and Pointers to buffers (bytes, and the address's
    remainder by 16)."""

    name: str
    arguments: tuple
    buffers: list


@dataclass(frozen=True)
class Pointer:
    buffer: int
