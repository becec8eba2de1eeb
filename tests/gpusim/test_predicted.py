"""The checked-in predictions are those of today's kernels: python -m benchmarks.predict_gpu --save gpu_predicted renews them."""
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from prediction import ARCHS, rows

DOCUMENT = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_predicted.json").read_text())
RECORDED = [row for row in DOCUMENT["rows"] if row["source"] == "fastgpt"]
RIVALS = [row for row in DOCUMENT["rows"] if not row["source"].startswith("fastgpt")]
# Which of our kernels does what a rival's does; its delta is made in our dq.
COMPARED = {
    "attention forward": "attention_forward_kernel", "attention dk, dv": "attention_dk_dv_kernel",
    "attention dq": "attention_dq_kernel",
    "layer norm forward": "layer_norm_forward_kernel", "layer norm backward": "layer_norm_backward_kernel",
    "GEGLU forward": "gelu_forward_kernel", "GEGLU backward": "gelu_backward_kernel",
    "cross entropy": "cross_entropy_kernel",
}
TOLERANCE = 0.03
QUICK = {"attention", "attention D=128", "add_layer_norm", "bias_gelu, tanh", "cross_entropy"}
# Where a rival is predicted to be faster by this share, and why. The model knows no differences below 0.1.
MISSES = {
    # Ours takes heads of any strides, so that q, k and v may be views of one product; the rival's lie one behind another,
    # which spares it 14 instructions of 64-bit addresses a step.
    ("attention forward, D = 64", 90): 0.02, ("attention forward, D = 128", 90): 0.07,
    # The rival, retuned, spills 20 registers for it, which the model hardly charges.
    ("attention dq, D = 128, retuned", 90): 0.15,
}
# Efficiency that is asked for, of the tensor cores' peak: (kernel, head size, architecture) -> share.
WANTED = {
    ("attention_forward_kernel", 64, 80): 0.62, ("attention_forward_kernel", 64, 90): 0.60,
    ("attention_forward_kernel", 128, 90): 0.60,
    # 0.62 is out of reach: with 8 warps of 16 queries each product waits for its own half of shared memory's port, and 4
    # warps of 32 spill. The best without spills.
    ("attention_forward_kernel", 128, 80): 0.58,
    **{(kernel, D, arch): 0.45 for kernel in ("attention_dq_kernel", "attention_dk_dv_kernel") for D in (64, 128)
       for arch in (80, 90)},
}


def name_of(row):
    """A rival's name without its head size."""
    return row["spec"].partition(", D =")[0]


def identity(row):
    return row["spec"], row["kernel"], row["arch"], json.dumps(row["config"], sort_keys=True)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_figures_are_todays(arch):
    compare(rows([arch], QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_all_figures_are_todays(arch):
    compare(rows([arch]))


def compare(found):
    recorded = {identity(row): row for row in RECORDED}
    for row in json.loads(json.dumps(found)):
        before = recorded[identity(row)]
        assert row["efficiency"] == pytest.approx(before["efficiency"], abs=TOLERANCE), identity(row)
        for name in ("registers", "spills", "shared", "tensor", "widths", "bytes"):
            assert row[name] == before[name], (identity(row), name)


def test_nothing_spills():
    assert {identity(row) for row in RECORDED if row["spills"]} == set()


@pytest.mark.parametrize("kernel, D, arch", WANTED)
def test_attention_keeps_the_tensor_cores_busy(kernel, D, arch):
    found = [row["efficiency"] for row in RECORDED if row["kernel"] == kernel and row["arch"] == arch
             and row["spec"] == ("attention" if D == 64 else "attention D=128")]
    assert found and min(found) >= WANTED[kernel, D, arch]


@pytest.mark.parametrize("row", [row for row in RIVALS if name_of(row) in COMPARED],
                         ids=lambda row: f"{row['spec']}-{row['arch']}")
def test_no_rival_is_predicted_to_be_faster(row):
    spec = "attention D=128" if "D = 128" in row["spec"] else "attention"
    ours = [mine["efficiency"] for mine in RECORDED if mine["kernel"] == COMPARED[name_of(row)] and mine["arch"] == row["arch"]
            and (mine["spec"] == spec or "attention" not in mine["spec"])]
    allowed = 1 - MISSES.get((row["spec"], row["arch"]), 0)
    assert ours and min(ours) >= allowed * row["efficiency"]


def test_no_access_moves_two_bytes():
    """But of a row's target: one instruction in a kernel."""
    for row in RECORDED:
        assert sum(count for width, count in row["widths"].items() if width.endswith((".16", ".8"))) <= 1 or (
            "key mask" in row["spec"]), (row["kernel"], row["widths"])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 120])
def test_what_smaller_processors_can_start(arch):
    """sm_86, 89 and 120 give a block 99 KB of shared memory, where sm_80 gives 163."""
    for row in rows([arch]):
        assert row["shared"] <= 99 * 1024, identity(row)
