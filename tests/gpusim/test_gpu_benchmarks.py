"""benchmarks/bench_gpu.py and benchmarks/tune.py where there is no GPU: all but the timer and torch.compile."""
import json
import sys
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2]))

import torch
from executors import Interpreter, running

from benchmarks import bench_gpu, results, training, tune
from benchmarks.cases import BOTH, FORWARD
from fastgpt import kernels, ops, reference
from fastgpt.kernels.launch import OnDevice

kernels.load()
NO_GPU = "PyTorch finds no CUDA device"


class FakeTimer:
    """Gives the next of some times for each call, the last again and again. runs: whether a call is made."""

    rounds = 3

    def __init__(self, *seconds, runs=False):
        self.left, self.runs = list(seconds) or [1e-3], runs

    def warm_up(self, run):
        if self.runs:
            run()

    def seconds(self, run):
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    def allocated(self):
        return 1e6

    def peak(self, run):
        run()
        return 3e6


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Here PyTorch's own numbers count: its outputs stay as they are."""


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "missing", lambda index: NO_GPU)


def small_cases():
    return {case.spec.name: case for case in bench_gpu.cases("cpu", gpt2=False)}


def test_everything_but_the_gpu_runs(one_thread, capsys):
    parts = {name: partial(bench_gpu.PARTS[name], compiler=lambda function: function) for name in ("ops", "training")}
    with running(Interpreter()):
        tops, rows = bench_gpu.run(FakeTimer(), parts, "cpu", False)
    assert results.check(results.document("gpu", {}, tops, rows))
    json.dumps(rows)
    specs = {spec.name for module in kernels.MODULES for spec in getattr(module, "SPECS", ())}
    calls = {(row["spec"], row["what"]): row for row in rows if row["contestant"] == bench_gpu.OURS}
    assert specs | {"training step"} < {spec for spec, _ in calls}
    assert all({(spec, FORWARD), (spec, BOTH)} <= calls.keys() for spec in specs)
    for row in calls.values():
        assert row["failure"] is None and row["seconds"]["median"] == 1e-3, row
    trained = [row for row in rows if row["spec"] == "training step"]
    assert len(trained) == 5 and all(row["failure"] is None for row in trained), "their losses are the same"
    on_cpu = [row for row in rows if row["contestant"] == bench_gpu.PYTORCH and row["op"] != "packed_attention"]
    assert on_cpu and all(row["failure"] is None and row["ratio"]["median"] == 1 for row in on_cpu)
    printed = capsys.readouterr().out
    assert all(name in printed for name in specs)


def test_a_wrong_kernel_has_no_figures(monkeypatch):
    case = small_cases()["layer_norm of 59"]
    monkeypatch.setattr(ops, "layer_norm", lambda **given: 1.01 * reference.layer_norm(**given))
    failures = bench_gpu.check(case)
    assert "norm-relative error" in failures.pop(bench_gpu.OURS) and set(failures) <= {bench_gpu.LIGER}
    found = bench_gpu.measure(case, FakeTimer(), failures={bench_gpu.OURS: "wrong"}, compiler=lambda function: function)
    assert [(row["contestant"], bool(row["seconds"])) for row in found[:2]] == [("fastgpt", False), ("pytorch", True)]
    assert found[0]["failure"] == "wrong" and found[1]["ratio"] is None


def test_a_rival_that_computes_something_else_has_no_figures(monkeypatch):
    case = small_cases()["attention, window"]
    assert bench_gpu.PYTORCH not in bench_gpu.check(case)
    monkeypatch.setitem(bench_gpu.RIVALS[bench_gpu.PYTORCH], "attention",
                        lambda inputs, window: bench_gpu._sdpa(inputs, window=window + 20))
    failures = bench_gpu.check(case)
    assert "output 0: norm-relative error" in failures[bench_gpu.PYTORCH]
    rows = bench_gpu.measure(case, FakeTimer(), FORWARD, failures=failures, compiler=None)
    assert {row["contestant"]: row["failure"] for row in rows}[bench_gpu.COMPILED] == failures[bench_gpu.PYTORCH]


def test_where_the_reference_has_no_results_nobody_has_figures(monkeypatch):
    def full(*tensors, **options):
        raise torch.OutOfMemoryError("no room\nfor this")
    monkeypatch.setattr(reference, "gelu", full)
    failures = bench_gpu.check(small_cases()["gelu, tanh"])
    assert set(failures) == {"fastgpt", "pytorch"}
    assert failures["fastgpt"].endswith("the reference has no results: OutOfMemoryError: no room")


def test_ratios_and_shares():
    case = small_cases()["gelu, tanh"]
    tops = [{"ceiling": "copy", "rate": {"median": 1e9}}, {"ceiling": "matmul", "rate": {"median": 1e12}}]
    timer = FakeTimer(1e-3, 2e-3, 4e-3, 2e-3, 4e-3, 1e-3, 4e-3, 1e-3, 2e-3, runs=True)
    ours, pytorch, compiled = bench_gpu.measure(case, timer, FORWARD, tops=tops, compiler=lambda function: function)
    assert (pytorch["ratio"]["median"], compiled["ratio"]["median"], ours["ratio"]) == (2, 4, None)
    assert ours["bytes"] == 2 * 300 * 300 * 2 and ours["flops"] == 0
    assert ours["ceiling"] == "copy" and ours["share"]["median"] == pytest.approx(ours["bytes"] / 1e9 / 1e-3)


def test_work_at_gpt2s_sizes():
    found = {case.spec.name: case for case in bench_gpu.cases("meta", gpt2=True)}
    assert not {"attention, GQA", "layer_norm of 59"} & set(found), "the same calls as others"
    heads, pairs = 8 * 12, 1024 * 1025 // 2
    assert found["attention"].flops(FORWARD) == 4 * heads * 64 * pairs
    assert found["attention"].flops(BOTH) == 14 * heads * 64 * pairs
    assert found["attention"].bytes(FORWARD) == 4 * heads * 1024 * 64 * 2
    assert found["cross_entropy"].flops(BOTH) == 6 * 8192 * 768 * 50257
    long = found["attention of 4096, D=128"]
    assert long.inputs["q"].shape == (2, 12, 4096, 128) and len(long.cut().inputs["q"]) == 1
    cut = found["cross_entropy"].cut()
    assert len(cut.inputs["x"]) == len(cut.others["targets"]) == 2 ** 30 // (8 * 50257)
    assert found["attention"].cut().inputs["q"].shape == found["attention"].inputs["q"].shape
    masked = found["attention, key mask"]
    assert masked.bytes(FORWARD) == found["attention"].bytes(FORWARD) + 8 * 1024


def test_a_step_whose_losses_are_others_has_no_figures(monkeypatch):
    steps = iter([[4.0, 3.0, 2.0], [4.0, 3.1, 2.0], [4.0, 3.001, 2.0], [4.0, 3.0, float("nan")], None])

    def step(*_):
        losses = next(steps)
        if losses is None:
            raise ImportError("no compiler")
        return partial(next, iter(losses), 0.0)
    monkeypatch.setattr(bench_gpu, "training_step", step)
    rows = bench_gpu.train(FakeTimer(), training.MODELS["tiny"], 2, "cpu")
    assert [bool(row["seconds"]) for row in rows] == [True, False, True, False, False]
    assert "expected [4.0, 3.0, 2.0]" in rows[1]["failure"] and rows[4]["failure"] == "ImportError: no compiler"
    assert rows[0]["tokens_per_second"]["median"] == pytest.approx(2 * 64 / 1e-3) and rows[0]["peak_mb"] == 2


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    functions, failures = bench_gpu.contestants(small_cases()["attention"])
    assert "flash-attn" not in functions
    assert failures["flash-attn"].startswith("ModuleNotFoundError: import of flash_attn")


class FlashAttention:
    """flash-attn's documented functions in plain PyTorch: q, k and v (B, T, H, D) or packed (N, H, D)."""

    @staticmethod
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert dropout_p == 0.0 and window_size[1] in (-1, 0)
        window = None if window_size[0] < 0 else window_size[0] + 1
        qkv = (x.transpose(1, 2) for x in (q, k, v))
        return reference.attention(*qkv, causal=causal, scale=softmax_scale, window=window).transpose(1, 2)

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        assert (max_seqlen_q, max_seqlen_k) == (79, 79)
        return reference.packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal)


def test_flash_attention_is_asked_for_the_same_function(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttention)
    found = small_cases()
    for name in ("attention, GQA", "attention, all keys", "attention, window", "packed_attention"):
        assert bench_gpu.FLASH not in bench_gpu.check(found[name]), name
    assert bench_gpu.check(found["attention, key mask"])[bench_gpu.FLASH] == "flash-attn has no key masks"


def test_bench_gpu_without_a_gpu(no_gpu):
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main([])
    assert ended.value.code == f"bench_gpu: {NO_GPU}", "a text: the interpreter prints it and ends with status 1"


def test_tune_chooses_what_does_not_spill(no_gpu, monkeypatch, capsys):
    spilling, good = (128, 128, 4, 3), (64, 64, 8, 2)
    monkeypatch.setattr(tune, "grid", lambda: [spilling, good])
    tune.main(["--arch", "80", "--kernel", "forward", "--width", "64"])
    first, _, best, worst, line = capsys.readouterr().out.splitlines()
    assert first == f"by the issue model: {NO_GPU}"
    assert best.split()[:2] == ["64x64", "w8s2"] and worst.split()[0] == "128x128" and worst.endswith(" spills")
    assert line.startswith(f'("forward", 80): {{64: {good}}},  # tuning.py has {{64: (')


def test_tune_refuses_what_it_cannot_tune(no_gpu, capsys):
    for options in (["--arch", "70"], ["--kernel", "forwards"]):
        with pytest.raises(SystemExit) as ended:
            tune.main(options)
        assert ended.value.code == 2
        assert "expected of [80, 90] and ['forward', 'dq', 'dk_dv']" in capsys.readouterr().err


def test_no_choice_where_nothing_fits():
    found = [((64, 64, 4, 2), {"reason": "3 spills", "score": 0.5}), ((64, 64, 4, 3), {"reason": "", "score": None})]
    assert tune.chosen(found) is None


@pytest.mark.parametrize("kernel, programs", [("forward", 96 * 8), ("dq", 96 * 8), ("dk_dv", 96 * 32)])
def test_what_would_be_timed(monkeypatch, kernel, programs):
    """The launch of a candidate on the GPU: its programs and options, and tensors as the recorded ones."""
    launched = []
    monkeypatch.setattr(tune, "GPU", "cpu")
    monkeypatch.setattr(OnDevice, "run", lambda *launch: launched.append(launch))
    monkeypatch.setattr("triton.testing.do_bench", lambda call, return_mode: call() or 0.25)
    spec, launch = tune.recorded(kernel, 90, 64, torch.bfloat16, "plain")
    row = tune.timed(spec, tune.changed(launch, (128, 32, 8, 2)), 90)
    assert row["score"] == -0.25 and row["text"] == "250.0 us"
    (_, count, arguments, constants, options), = launched
    assert count == programs and options == {"num_warps": 8, "num_stages": 2}
    assert (constants["BLOCK_M"], constants["BLOCK_N"]) == (128, 32)
    for meta, real in zip(launch.arguments.values(), arguments):
        if isinstance(meta, torch.Tensor):
            assert (real.shape, real.stride(), real.dtype) == (meta.shape, meta.stride(), meta.dtype)


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    bench_gpu.main(["--rounds", "3", "--parts", "ops", "training"])
    found = results.check(json.loads(capsys.readouterr().out.splitlines()[-1]))
    ours = [row for row in found["rows"] if row["contestant"] == bench_gpu.OURS]
    assert ours and all(row["failure"] is None and row["seconds"]["median"] > 0 for row in ours)
    assert all(0 < row["share"]["median"] < 1 for row in ours if "share" in row), "more than the ceiling allows"


@pytest.mark.gpu
def test_decoding_on_a_gpu(capsys):
    bench_gpu.main(["--rounds", "3", "--parts", "kernels", "generation", "--scenarios", "decode", "prefill", "--dtypes", "bfloat16",
                    "int4"])
    found = results.check(json.loads(capsys.readouterr().out.splitlines()[-1]))
    ours = [row for row in found["rows"] if row["contestant"] == bench_gpu.OURS]
    assert {row["spec"].partition(",")[0] for row in ours} == {"paged_attention", "weight_only", "sample", "generation"}
    assert all(row["failure"] is None and row["seconds"]["median"] > 0 for row in ours)
    assert all(0 < row["share"]["median"] < 1.2 for row in ours), "reading alone may be faster than a copy, but not by much"
