"""What the machine code of every CUDA kernel says at the sizes of cuda_cases: rows of benchmarks/results/gpu_predicted.json."""
import math
import re

import cuda_cases
import nvcc
from cuda_executors import running_cuda
from cuda_machine import CudaRecorder
from efficiency import MACHINES, memory_bytes_per_clock
from prediction import facts, rounded
from ptx_parser import parse
from sass_model import describe

ARCHS = (75, 80, 89, 90, 100, 120)
SOURCE = "fastgpt, CUDA"


def rows(archs=ARCHS, chosen=None):
    """One for each case and kernel (of kernels without bytes: for each kernel) and architecture, as JSON has it. chosen: the
    names of some cases."""
    found = {}
    for arch in archs:
        for case in (case for case in cuda_cases.cases(arch) if chosen is None or case.name in chosen):
            for symbol, grid, block, shared, _ in launches(case, arch):
                key = arch, symbol, case.name if name_of(symbol) in case.bytes else None
                if key not in found:
                    found[key] = row(case, arch, symbol, grid, block, shared)
    return list(found.values())


def launches(case, arch):
    processors = MACHINES.get(arch, MACHINES[90])[2]
    with running_cuda(CudaRecorder(processors)) as recorder:
        case.run()
    return recorder.launches


def row(case, arch, symbol, grid, block, shared):
    ptx, warps = nvcc.find(symbol, arch), math.prod(block) // 32
    static = parse(ptx, symbol).static_shared
    description = describe(nvcc.cubin(ptx, symbol, arch), arch, warps, shared + static, streams=True)
    kernel, blocks = name_of(symbol), math.prod(grid)
    share = efficiency(description, arch, blocks, case.useful) if kernel in case.bytes else None
    return {"spec": case.name, "kernel": kernel, "arch": arch, "source": SOURCE, "config": {"grid": blocks, "num_warps": warps},
            "efficiency": rounded(share), "bytes": case.bytes.get(kernel, 0),
            "bytes_per_clock": rounded(description["bytes_per_clock"]), **facts(description), "shared": shared + static}


def name_of(symbol):
    """fastgpt::cuda::kernel<...>'s own name."""
    length, rest = re.match(r"_ZN7fastgpt4cuda(\d+)(.*)", symbol).groups()
    return rest[:int(length)]


def efficiency(description, arch, blocks, useful):
    """The share of device memory's rate at which the processors that have a block bring what they must, if the busiest pipe
    of their loop and memory were all that they wait for. What is done once in several turns of the loop counts in each.

    What it cannot tell: whether enough copies are under way to hide memory's latency; see efficiency.py for the rest.
    """
    if arch not in MACHINES:
        return None
    busy = min(1.0, blocks / MACHINES[arch][2])
    return min(1.0, description["bytes_per_clock"] * useful * busy / memory_bytes_per_clock(arch))
