"""AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer over the engine's C++: slow, a build for each."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import build_extension
from engines import small_model
from processes import PACKAGE_FOLDER

from fastgpt import extension

SOURCES = ("engine_avx2", "engine_baseline", "isa", "pool")
# ThreadSanitizer knows no fork from a process with threads.
KINDS = {"address": ("libasan.so", ["-fsanitize=address"], "forks"),
         "undefined": ("libubsan.so", ["-fsanitize=undefined", "-fno-sanitize=alignment"], "forks"),
         "thread": ("libtsan.so", ["-fsanitize=thread"], "")}


@pytest.mark.slow  # a minute each
@pytest.mark.skipif(bool(extension.MISSING) or not sys.platform.startswith("linux"), reason="needs the extension, on Linux")
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_is_clean(kind, tmp_path):
    library, flags, forks = KINDS[kind]
    runtime = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"the compiler has no {library}")
    sources = [f"csrc/cpu/{name}.cpp" for name in SOURCES] + ["csrc/bindings_engine.cpp"]
    path = build_extension(tmp_path, {source: [*flags, "-O1", "-g1"] for source in sources})
    small_model(block_size=128).save_pretrained(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sanitized.py")), str(path), str(tmp_path / "model"), forks],
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": PACKAGE_FOLDER, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0",
             "UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"})
    assert (result.returncode, result.stdout.strip()) == (0, "clean"), result.stdout[-2000:] + result.stderr[-6000:]
