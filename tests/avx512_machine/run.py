"""python run.py EXTENSION MODEL ARGUMENTS: pytest with ARGUMENTS, the kernels of level avx512 on an emulated processor of MODEL.

EXTENSION was built with tables.h. LD_BIND_NOW=1: a symbol that is bound late saves all registers, for which it has measured this
machine's.
"""
import ctypes
import importlib.util
import os
import sys

from processor import Processor

assert os.environ.get("LD_BIND_NOW")
processor = Processor(sys.argv[2])
enter = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(processor.call)
os.environ["FASTGPT_MACHINE"] = f"{ctypes.cast(enter, ctypes.c_void_p).value:x}"
spec = importlib.util.spec_from_file_location("fastgpt._C", sys.argv[1])
sys.modules["fastgpt._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
# As the cpuid there decides.
print(f"{sys.argv[2]}: {module.active_level()}, products: {module.engine_dots()}", flush=True)

import pytest


class Shorter:
    """Random compositions of a batch take minutes each here."""

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if hasattr(item.module, "CASES"):
                item.module.CASES = 12


code = pytest.main(sys.argv[3:], [Shorter()])
print(f"{processor.calls} calls of kernels", flush=True)
os._exit(code)  # the emulator's memory can't be taken down in an order that it likes
