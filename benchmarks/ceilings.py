"""What the processor does at best, measured in the same run as what is held against it, by csrc/cpu/ceilings.inl.

A ceiling is a contestant of `timing.compare`, so that each round's time is a share of that round's ceiling.
"""
from dataclasses import dataclass

import torch

from benchmarks.machine import cache_bytes, has_bf16, has_vnni
from benchmarks.timing import Variant, compare, spread
from fastgpt import extension

CHAINS = 12  # vector instructions in a step of the arithmetic kernel
# kind -> (its number in csrc/kernels.h, operations of one float lane in one instruction)
ARITHMETIC = {"float32 FMA": (0, 2), "bfloat16 dot": (1, 4), "int8 dot": (2, 8)}
MEMORY_BYTES = 256 << 20
DEFAULT_CACHES = {2: 512 << 10, 3: 8 << 20}  # where the system does not tell
SECONDS = 0.005  # of one run
_sink = torch.zeros(1024)  # a float for each task
_buffers = {}  # bytes -> a tensor of that size, read again by every ceiling


@dataclass(frozen=True)
class Ceiling:
    name: str
    unit: str  # GFLOP/s, Gop/s or GB/s
    work: float  # operations or bytes of one run
    run: object

    def variant(self, seconds=SECONDS):
        return Variant(self.name, self.run, sample_seconds=seconds)

    def rate(self, seconds):
        """Operations or bytes a second."""
        return self.work / seconds


def arithmetic_kind(dtype):
    """The fastest arithmetic that this processor has for a product of `dtype`."""
    return "bfloat16 dot" if dtype == "bfloat16" and has_bf16() else "float32 FMA"


def available(kind):
    return extension._C is not None and {"bfloat16 dot": has_bf16, "int8 dot": has_vnni}.get(kind, lambda: True)()


def arithmetic(kind, threads):
    """The peak of a kind of arithmetic, on registers alone; None without the extension."""
    if extension._C is None:
        return None
    number, operations = ARITHMETIC[kind]
    tasks = 4 * threads
    steps = 20_000
    work = operations * extension._C.vector_width() * CHAINS * steps * tasks
    unit = "Gop/s" if number == 2 else "GFLOP/s"
    return Ceiling(kind, unit, work, lambda: extension._C.arithmetic(number, _sink.data_ptr(), tasks, steps))


def reading(where, threads):
    """The bandwidth of reading from "L2", "L3" or "memory"; None without the extension."""
    if extension._C is None:
        return None
    size = working_set(where, threads)
    data = _buffer(size)
    # Each thread keeps to its own part of a cache; memory is cut finer, so that a thread that comes late takes less.
    tasks = threads if where != "memory" else 8 * threads
    repeats = max(1, (64 << 20) * threads // size)
    return Ceiling(f"{where} read", "GB/s", data.nbytes * repeats, lambda: extension._C.read_memory(
        data.data_ptr(), data.numel(), repeats, _sink.data_ptr(), tasks))


def working_set(where, threads):
    """Bytes that stay in a cache (half of every L2, a quarter of an L3 that others share), or that no cache holds."""
    caches = DEFAULT_CACHES | cache_bytes()
    return {"L2": caches[2] // 2 * threads, "L3": max(caches[3] // 4, caches[2] * threads),
            "memory": max(MEMORY_BYTES, 2 * caches[3])}[where]


def home(size, threads):
    """Where `size` bytes live when they are used again and again."""
    caches = DEFAULT_CACHES | cache_bytes()
    return "L2" if size <= caches[2] * threads else "L3" if size <= caches[3] else "memory"


def evict():
    """Empties the caches by reading what no cache holds."""
    _buffer(working_set("memory", 1)).sum()


def _buffer(size):
    if size not in _buffers:
        _buffers[size] = torch.ones(size // 4)
    return _buffers[size]


def everything(threads):
    """All the ceilings of this processor on so many threads."""
    kinds = [arithmetic(kind, threads) for kind in ARITHMETIC if available(kind)]
    return kinds + [reading(where, threads) for where in ("L2", "L3", "memory")] if kinds else []


def measure(threads, rounds=9, neighbours=None):
    """Rows for a results document: each ceiling's rate, in its unit. The extension's threads must have been set."""
    found = everything(threads)
    result = compare([c.variant() for c in found], rounds=rounds, neighbours=neighbours)
    return [{"ceiling": c.name, "threads": threads, "unit": c.unit,
             "rate": spread(c.rate(s.seconds) / 1e9 for s in result.samples[c.name])} for c in found]
