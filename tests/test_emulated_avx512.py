"""The kernels in the shape that AVX-512 gives them, on a machine without it.

An extension is built whose avx2 level has vectors of 16 floats, and the ops' own tests run against it.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import build_extension
from processes import PACKAGE_FOLDER

from fastgpt import extension

TESTS = Path(__file__).parent
OTHERS = ("test_extension.py", "test_benchmarks.py")  # of levels as such, and of their speed
FILES = [str(p) for p in sorted(TESTS.glob("test_*.py"))
         if re.search(r"def test_\w+\([^)]*\blevel\b", p.read_text()) and p.name not in OTHERS]
# Vectors wider than the machine's are compiled in pieces, and which products the compiler then fuses with an addition
# differs from piece to piece; -O2 takes a third of the time of -O3.
FLAGS = ["-DFASTGPT_VEC_WIDTH=16", "-O2", "-ffp-contract=off"]
RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastgpt._C", sys.argv[1])
sys.modules["fastgpt._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.select_level("avx2")
assert module.vector_width() == 16
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow  # builds a level and runs every op test again: 90 s
@pytest.mark.skipif(bool(extension.MISSING) or extension.level_refusal("avx2") is not None,
                    reason="needs the extension and a processor with AVX2")
def test_the_ops_with_vectors_of_16(tmp_path):
    assert FILES, "no test file has a test for every level"
    path = build_extension(tmp_path, {"csrc/cpu/level_avx2.cpp": FLAGS})
    search = os.pathsep.join([PACKAGE_FOLDER, str(TESTS)])
    result = subprocess.run([sys.executable, "-c", RUN, str(path), "-k", "avx2", "-p", "no:cacheprovider", *FILES],
                            capture_output=True, text=True, check=False, cwd=TESTS,
                            env={**os.environ, "PYTHONPATH": search})
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r"\d\d+ passed", result.stdout.splitlines()[-1]), result.stdout[-1000:]
