"""The checked-in predictions of the CUDA kernels are those of today's: python -m benchmarks.predict_gpu --cuda --save
gpu_predicted renews them."""
import json
from pathlib import Path

import cuda_shim
import nvcc
import pytest

REASON = nvcc.MISSING or cuda_shim.missing()
if REASON:
    pytest.skip(REASON, allow_module_level=True)

from cuda_prediction import ARCHS, SOURCE, name_of, rows

DOCUMENT = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_predicted.json").read_text())
RECORDED = [row for row in DOCUMENT["rows"] if row["source"] == SOURCE]
TOLERANCE = 0.03
# The share of device memory's rate that is asked for: start of a case's name -> on A100, on H100.
WANTED = {"paged attention, bfloat16": (0.95, 0.95), "paged attention, float16": (0.95, 0.95),
          "paged attention, int8": (0.95, 0.95), "paged attention, float8": (0.95, 0.95),
          # A layer's last product has 48 blocks, fewer than there are processors.
          "weight_only_linear, int8": (0.95, 0.85), "weight_only_linear, int4": (0.9, 0.65)}


def identity(row):
    return row["spec"], row["kernel"], row["arch"], json.dumps(row["config"], sort_keys=True)


@pytest.mark.skipif(nvcc.version() != DOCUMENT["settings"].get("nvcc"), reason="recorded with another nvcc")
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[] if arch == 80 else [pytest.mark.slow]) for arch in ARCHS])
def test_the_figures_are_todays(arch):
    recorded = {identity(row): row for row in RECORDED}
    for row in json.loads(json.dumps(rows([arch]))):
        before = recorded[identity(row)]
        assert row["efficiency"] == pytest.approx(before["efficiency"], abs=TOLERANCE), identity(row)
        for name in ("registers", "spills", "shared", "blocks", "tensor", "widths", "bytes"):
            assert row[name] == before[name], (identity(row), name)


def test_nothing_spills():
    assert not {identity(row) for row in RECORDED if row["spills"]}


def test_every_kernel_fits_every_processor():
    assert {row["arch"] for row in RECORDED} == set(ARCHS) and all(row["blocks"] for row in RECORDED)


@pytest.mark.parametrize("case", WANTED)
def test_memory_is_what_they_wait_for(case):
    for column, arch in enumerate((80, 90)):
        found = [row["efficiency"] for row in RECORDED if row["spec"].startswith(case) and row["arch"] == arch and row["bytes"]]
        assert found and min(found) >= WANTED[case][column], (case, arch, found)


def test_keys_and_weights_come_in_16_bytes():
    """Into shared memory by itself where the processor can copy; what is loaded beside them is small."""
    for row in RECORDED:
        if row["kernel"] in ("paged_attention_kernel", "paged_attention_bytes_kernel", "weight_only_kernel"):
            copies = "LDGSTS.128" if row["kernel"][0] == "p" and row["arch"] >= 80 else "LDG.128"
            assert row["widths"].get(copies, 0) >= 4, (identity(row), row["widths"])


def test_names():
    assert name_of("_ZN7fastgpt4cuda17copy_pages_kernelI5uint4EEvPcllPKi") == "copy_pages_kernel"
