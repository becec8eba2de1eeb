import ctypes
import sys

import pytest
from processes import run_python

FAULTS = """
import resource, sys, torch
from fastgpt.allocator import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(40 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(30)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone")
def test_kept_memory_comes_back_without_new_pages():
    fresh, kept = (int(run_python(FAULTS, *args).stdout) for args in ((), ("keep",)))
    assert fresh > 1000 and kept < 100
