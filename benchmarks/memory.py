"""The memory that one step of a case takes at its peak, beyond its inputs, in a process that does nothing else.

python -m benchmarks.memory CASE fastgpt|pytorch DTYPE SIZES is the child; the parent calls `peak_mb`.
"""
import sys

import torch

from benchmarks import cases
from benchmarks.processes import Parent, Process, memory_mb, reset_peak
from benchmarks.timing import Failure


def peak_mb(case, variant, dtype, sizes):
    """MB, or the reason why they can't be had, as text."""
    child = Process(variant, [sys.executable, "-m", "benchmarks.memory", case.key, variant, dtype, sizes])
    try:
        child.prepare()
        return child.sample().values["peak_mb"]
    except Failure as failure:
        return str(failure)
    finally:
        child.close()


def main(key, variant, dtype, sizes):
    parent = Parent()
    case = next(c for c in cases.all_cases(cases.SIZES[sizes]) if c.key == key)
    inputs = case.make(cases.DTYPES[dtype], torch.Generator().manual_seed(0))
    if not reset_peak():
        parent.refuse("the system does not tell a process's peak memory")
        return

    def step():
        before = memory_mb("VmRSS")
        # The op's very first run counts, with the buffers that it keeps for later ones; the copy of the inputs does not.
        cases.step(case, case.ours if variant == "fastgpt" else case.pytorch, inputs)()
        return {"peak_mb": memory_mb("VmHWM") - before - sum(t.nbytes for t in inputs.values()) / 2 ** 20}

    parent.serve(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
