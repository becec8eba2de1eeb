"""The machine code of level avx512 itself, whatever processor is here: its kernels run on an emulated one, chosen by what its
cpuid says, and the ops' own tests judge them.

Needs `pip install bochscpu-python==0.4.0` (avx512_machine/processor.py), which is built for Linux on x86-64 alone.
"""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import ROOT, build_extension
from processes import PACKAGE_FOLDER
from test_emulated_avx512 import FILES

TESTS = Path(__file__).parent
MACHINE = TESTS / "avx512_machine"
# The dot products that a processor of a model has, and the tests: ops are the same on all three.
ENGINE = [f for f in FILES if re.search("engine_bits|packed|paged", Path(f).name)]
MODELS = {"sapphire_rapids": ("vnni, bf16", FILES), "icelake": ("vnni", ENGINE), "skylake": ("", ENGINE)}


@pytest.fixture(scope="module")
def machine_extension(tmp_path_factory):
    flags = ["-include", str(MACHINE / "tables.h"), f"-I{ROOT}/csrc"]
    return str(build_extension(tmp_path_factory.mktemp("machine"), {"csrc/cpu/isa.cpp": flags}))


@pytest.mark.slow  # 12 minutes and twice 4
@pytest.mark.skipif(importlib.util.find_spec("bochscpu") is None, reason="needs bochscpu-python, an emulated processor")
@pytest.mark.parametrize("model", MODELS)
def test_the_ops_on_a_processor_with_avx512(model, machine_extension):
    dots, files = MODELS[model]
    search = os.pathsep.join([PACKAGE_FOLDER, str(TESTS), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, str(MACHINE / "run.py"), machine_extension, model, "-k", "avx512", "-p",
                             "no:cacheprovider", *files],
                            capture_output=True, text=True, check=False, cwd=TESTS,
                            env={**os.environ, "PYTHONPATH": search, "LD_BIND_NOW": "1"})
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert lines[0] == f"{model}: avx512, products: {dots}", lines[0]
    assert re.search(r"\d\d+ passed", lines[-2]) and int(lines[-1].split()[0]) > 100, result.stdout[-1000:]
