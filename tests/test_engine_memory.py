"""What the engine takes of memory: while it loads, while it runs, and after very many requests."""
import json
import sys

import pytest
from engines import small_model
from processes import run_python

from fastgpt.extension import MISSING

pytestmark = [pytest.mark.skipif(bool(MISSING), reason="needs the extension"),
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]

STATUS = """
import json, sys
def megabytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
"""
LOAD = STATUS + """
import numpy
before = megabytes("VmRSS")
from fastgpt import LLM, SamplingParams
llm = LLM(sys.argv[1], sys.argv[2])
loading = megabytes("VmHWM")
llm.generate([[1] * 100], SamplingParams(max_tokens=100, temperature=0))
print(json.dumps({"before": before, "loading": loading, "running": megabytes("VmHWM"), "torch": "torch" in sys.modules,
                  "packed": llm._weights._arena._bytes.nbytes / 2 ** 20,
                  "kv": 200 * llm.runner.bytes_per_token / 2 ** 20}))
"""
MANY = STATUS + """
import random
import numpy as np
from fastgpt import LLM, SamplingParams
llm = LLM(sys.argv[1], sys.argv[2], page_size=16, kv_cache_tokens=4096)
rng = np.random.default_rng(0)
def serve(count):
    for _ in range(count // 100):
        prompts = [rng.integers(0, 61, rng.integers(1, 12)).tolist() for _ in range(100)]
        params = [SamplingParams(max_tokens=int(rng.integers(0, 3)), n=int(rng.integers(1, 3)), seed=7) for _ in prompts]
        if rng.random() < 0.1:
            for _, _ in zip(llm.stream(prompts, params), range(20)):
                pass
        else:
            llm.generate(prompts, params)
        llm._reservations.pages.check()
        assert llm.free_pages == llm._reservations.pages.num_pages
serve(5000)
before = megabytes("VmRSS")
serve(int(sys.argv[3]))
print(json.dumps({"growth": megabytes("VmRSS") - before}))
"""


def run(code, *args, timeout=900):
    result = run_python(code, *map(str, args), timeout=timeout)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model(n_layer=6, n_embd=512, n_head=8, n_inner=None, vocab_size=30000).save_pretrained(path / "large")
    small_model().save_pretrained(path / "small")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_loading_and_running_take_little_beside_the_packed_weights(folder, dtype):
    found = run(LOAD, folder / "large", dtype)
    matrix = 4 * 512 * 2048 * 4 / 2 ** 20  # the largest that is read whole, twice: as it is stored and in order
    assert found["loading"] <= found["before"] + 1.3 * found["packed"] + 2 * matrix + 20
    assert found["running"] <= 1.15 * (found["packed"] + found["kv"]) + 150
    assert not found["torch"]


@pytest.mark.slow  # a minute or two
def test_very_many_requests_leave_nothing_behind(folder):
    assert run(MANY, folder / "small", "int8", 100_000)["growth"] < 8
