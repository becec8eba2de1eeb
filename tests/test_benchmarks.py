"""The benchmarks' own machinery, and a tiny run of each script."""
import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks import (
    bench_generate,
    bench_ops,
    bench_quality,
    bench_train,
    cases,
    ceilings,
    contestants,
    decoding,
    generation,
    machine,
    peers,
    plots,
    report,
    results,
    timing,
    training,
)
from benchmarks.neighbours import WINDOW, Neighbours, busy_seconds
from benchmarks.processes import Process, memory_mb
from benchmarks.threads import use_threads
from fastgpt import GPT, extension, ops

needs_extension = pytest.mark.skipif(extension._C is None, reason=str(extension.MISSING))


@pytest.fixture
def alone():
    """Neighbours that never disturb."""
    return Neighbours(busy=lambda: None)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Here PyTorch's own speed and numbers count: its outputs stay as they are."""


@pytest.fixture
def run_script(capsys):
    """Runs a script's main with options: -> the document that it prints last."""
    def run(script, *options):
        script.main(options)
        return results.check(json.loads(capsys.readouterr().out.splitlines()[-1]))
    return run


class Scripted(timing.Variant):
    """A contestant whose samples are given."""

    def __init__(self, name, seconds, dirty=()):
        super().__init__(name, lambda: None)
        self.seconds, self.dirty_rounds, self.log = list(seconds), dirty, []

    def prepare(self):
        pass

    def sample(self, evict=None):
        return timing.Sample(self.seconds.pop(0))


def test_the_ratio_is_taken_round_by_round(alone):
    # The machine slows down tenfold midway: the ratio of medians would be anything, that of each round is 2.
    drift = [1, 1, 1, 10, 10]
    result = timing.compare([Scripted("a", drift), Scripted("b", [2 * d for d in drift])], rounds=5, neighbours=alone)
    assert result.ratio("a", "b") == {"median": 2, "q1": 2, "q3": 2, "count": 5}
    assert result.timing("b") == {"median": 2, "q1": 2, "q3": 20, "count": 5}


def test_a_rate_and_a_share_of_what_a_contestant_measured(alone):
    result = timing.Comparison(["a", "top"])
    result.samples["a"] = [timing.Sample(9.0, values={"token_seconds": s}) for s in (1.0, 2.0, 4.0)]
    result.samples["top"] = [timing.Sample(s) for s in (1.0, 1.0, 3.0)]
    assert timing.rate(result.timing("a", "token_seconds"), 6) == {"median": 3, "q1": 2, "q3": 4, "count": 3}
    assert result.shares("a", lambda seconds: seconds["top"], "token_seconds")["median"] == 0.75


def test_the_order_rotates(alone):
    log = []

    def contestant(name):
        variant = Scripted(name, [1.0] * 3)
        variant.sample = lambda evict: log.append(name) or timing.Sample(1.0)
        return variant

    timing.compare([contestant(name) for name in "abc"], rounds=3, neighbours=alone)
    assert "".join(log) == "abcbcacab"


def test_disturbed_rounds_do_not_count_while_enough_are_clean(alone):
    result = timing.compare([Scripted("a", [1, 1, 5, 1]), Scripted("b", [3, 3, 3, 3])], rounds=4, neighbours=alone)
    result.samples["a"][2].dirty = True
    assert result.timing("a")["count"] == result.ratio("a", "b")["count"] == 3
    assert result.ratio("a", "b")["q1"] == 3 and result.dirty("a") == 1
    result.samples["b"][0].dirty = True  # two clean rounds are too few: all four count
    assert result.ratio("a", "b")["count"] == 4 and result.timing("a")["count"] == 3


def test_a_wrong_variant_has_no_figures(alone):
    def check():
        raise AssertionError("output 0: off by 3")

    timed = []
    wrong = timing.Variant("wrong", lambda: timed.append(1), check=check)
    result = timing.compare([wrong, Scripted("right", [1.0] * 3)], rounds=3, neighbours=alone)
    assert result.failures == {"wrong": "AssertionError: output 0: off by 3"} and not timed
    assert result.timing("wrong") is None and result.ratio("right", "wrong") is None
    assert result.timing("right")["count"] == 3


def test_a_variant_that_breaks_in_a_later_round_has_no_figures(alone):
    runs = iter(range(4))

    def run():
        if next(runs) == 3:
            raise RuntimeError("out of luck")

    breaks = timing.Variant("a", run, sample_seconds=0.0)
    result = timing.compare([breaks, Scripted("b", [1.0] * 4)], rounds=4, neighbours=alone)
    assert result.failures == {"a": "RuntimeError: out of luck"} and result.timing("b")["count"] == 4


def test_a_budget_ends_the_run(alone):
    def slow():
        time.sleep(0.03)

    def rounds(budget):
        variant = timing.Variant("a", slow, known_seconds=0.03)
        return timing.compare([variant], rounds=9, budget=budget, neighbours=alone).timing("a")["count"]

    assert rounds(0.001) == 1 and rounds(0.05) == 3 and rounds(10.0) == 9


def test_a_short_run_is_repeated_and_setup_is_not_timed(alone):
    runs = []
    variant = timing.Variant("a", lambda: runs.append(1), setup=lambda: time.sleep(0.02), sample_seconds=0.002)
    result = timing.compare([variant], rounds=3, neighbours=alone)
    assert variant.repeats > 10 and result.timing("a")["median"] < 1e-4


def test_cold_samples_are_single_runs_after_an_eviction(alone):
    log = []
    variant = timing.Variant("a", lambda: log.append("run"), sample_seconds=0.001)
    variant.prepare()
    log.clear()
    variant.sample(evict=lambda: log.append("evict"))
    assert log == ["evict", "run"]


class FakeMachine:
    """Busy seconds by a script: each reading is the wall clock times the cores that are in use."""

    def __init__(self, cores):
        self.cores, self.total, self.last = cores, 0.0, time.perf_counter()

    def __call__(self):
        now = time.perf_counter()
        self.total += self.cores * (now - self.last)
        self.last = now
        return self.total


@pytest.mark.parametrize(("cores", "dirty"), [(0.0, False), (1.0, True)])
def test_samples_beside_a_busy_process_are_marked(cores, dirty):
    neighbours = Neighbours(busy=FakeMachine(cores), patience=(0.0, 0.0))
    sample = timing.Sample(1.0)
    time.sleep(WINDOW)
    neighbours.add(sample)
    assert sample.dirty is dirty


def test_a_contestants_own_work_is_no_disturbance():
    neighbours = Neighbours(busy=FakeMachine(1.0))
    sample = timing.Sample(1.0, cpu_seconds=WINDOW)
    time.sleep(WINDOW)
    neighbours.add(sample)
    assert sample.dirty is False


def test_waiting_for_neighbours_ends():
    busy = FakeMachine(1.0)
    neighbours = Neighbours(busy=busy, patience=(3 * WINDOW, 4 * WINDOW))
    neighbours.dirty = True
    start = time.perf_counter()
    neighbours.wait_until_quiet()
    assert neighbours.dirty and WINDOW < time.perf_counter() - start < 20 * WINDOW
    busy.cores = 0.0
    neighbours.wait_until_quiet()
    assert not neighbours.dirty


@pytest.mark.skipif(busy_seconds() is None, reason="no /proc/stat")
def test_busy_seconds_count_what_this_process_uses():
    before, cpu = busy_seconds(), time.process_time()
    while time.process_time() - cpu < 0.2:
        pass
    assert busy_seconds() - before > 0.1
    assert busy_seconds("/nonexistent") is None


CHILD = """
import sys
from benchmarks.processes import Parent
parent = Parent()
print("noise that must not come between the messages")
{body}
"""


def child(body, **options):
    return Process("child", [sys.executable, "-c", CHILD.format(body=body)], env={"PYTHONPATH": str(ROOT)}, **options)


def test_a_child_steps_when_it_is_asked_to(alone):
    process = child("n = iter(range(9)); parent.serve(lambda: {'step': next(n)}, ready='yes')")
    result = timing.compare([process, Scripted("here", [1.0] * 3)], rounds=3, neighbours=alone)
    process.close()
    assert process.head == {"ready": "yes"} and process.child.returncode == 0
    assert [s.values["step"] for s in result.samples["child"]] == [0, 1, 2]
    assert result.ratio("child", "here")["median"] > 1


@pytest.mark.parametrize(("body", "reason"), [
    ("parent.refuse('no compiler here')", "no compiler here"),
    ("sys.exit(3)", "died with exit status 3"),
    ("parent.serve(lambda: sys.exit(4))", "died with exit status 4"),
    ("import time; time.sleep(60)", "took more than the limit of 0.5 s"),
    ("import time; parent.serve(lambda: time.sleep(60))", "took more than the limit of 0.5 s"),
])
def test_a_child_that_fails_says_why(alone, body, reason):
    process = child(body, limit=0.5 if "sleep" in body else 60.0)
    result = timing.compare([process, Scripted("here", [1.0] * 3)], rounds=3, neighbours=alone)
    process.close()
    assert result.failures == {"child": reason} and process.child.poll() is not None
    assert result.timing("here")["count"] == 3


def test_memory_figures():
    assert memory_mb("VmHWM") is None or memory_mb("VmHWM") >= memory_mb("VmRSS") > 10


def test_the_work_of_a_case_counts_what_it_must():
    found = {c.key: c for c in cases.all_cases()}
    assert found["linear, forward, 1024x768 -> 3072"].flops == 2 * 1024 * 768 * 3072
    assert found["cross_entropy, forward + backward, 1024x768 -> 50257"].flops == 6 * 1024 * 768 * 50257
    # 4 * D for each pair (i, j <= i), and 2.5 times that in the backward
    assert found["attention, forward, 4x12x128x64"].flops == 4 * 64 * 4 * 12 * (128 * 129 // 2)
    assert found["attention, forward + backward, 4x12x128x64"].flops == 3.5 * 4 * 64 * 4 * 12 * (128 * 129 // 2)
    # On the CPU packed attention is attention, once a sequence
    assert {c.op for c in found.values()} == set(ops.OPS) - {"packed_attention"}


def test_the_traffic_of_a_case_counts_each_tensor():
    every = cases.all_cases(cases.SIZES["tiny"])
    tiny = {c.key: bench_ops.Subject(c, "float32") for c in every if "float32" in c.targets}
    M, K, N = 16, 24, 96
    x, weight, bias, y = 4 * M * K, 4 * N * K, 4 * N, 4 * M * N
    assert tiny[f"linear, forward, {M}x{K} -> {N}"].traffic == x + weight + bias + y
    assert tiny[f"linear, input gradient, {M}x{K} -> {N}"].traffic == y + weight + x
    assert tiny[f"linear, weight gradient, {M}x{K} -> {N}"].traffic == y + x + weight + bias
    assert tiny["gelu, forward + backward, 2x8x96"].traffic == 5 * 4 * 2 * 8 * 96  # x twice, y, dy, dx


def test_a_wrong_op_has_no_figures(monkeypatch, alone):
    case = next(c for c in cases.all_cases(cases.SIZES["tiny"]) if c.op == "gelu")
    broken = cases.Case(**{**vars(case), "ours": lambda x: torch.relu(x)})
    row = bench_ops.measure(bench_ops.Subject(broken, "float32"), 1, bench_ops.Effort(rounds=1), alone)
    assert "output 0: norm-relative error" in row["failures"]["fastgpt"]
    assert row["seconds"] is None and row["ratio"] is None and row["pytorch_seconds"]


@needs_extension
def test_a_slow_rival_is_not_waited_for(alone):
    case = next(c for c in cases.all_cases(cases.SIZES["tiny"]) if c.op == "gelu")
    subject = bench_ops.Subject(case, "float32")
    subject.pytorch_cpu_seconds = 100.0
    row = bench_ops.measure(subject, 2, bench_ops.Effort(rounds=1, cap=20.0), alone)
    assert row["failures"] == {"pytorch": "a run takes more than the cap of 20 s"}
    assert row["seconds"] and row["ratio"] is None


@needs_extension
def test_ceilings_grow_with_the_vectors_and_shrink_with_distance(level, alone):
    with use_threads(1):
        rates = {row["ceiling"]: row["rate"]["median"] for row in ceilings.measure(1, 5, alone)}
    assert rates["L2 read"] > rates["memory read"] > 0.5
    # From one operation a cycle at 1 GHz to four units at 8 GHz: a wrong count of lanes or chains would leave this.
    assert extension._C.vector_width() * 0.5 < rates["float32 FMA"] < extension._C.vector_width() * 8 * 8


@pytest.mark.parametrize(("value", "verdict"), [((1.2, 1.3), "yes"), ((0.9, 1.1), "close"), ((0.8, 0.9), "no")])
def test_a_target_is_met_by_the_median(value, verdict):
    spread = {"median": value[0], "q1": 0.5, "q3": value[1], "count": 5}
    row = {"targets": {"ratio": 1.0, "memory": 0.3, "share": 0.8}, "ratio": spread, "memory": 0.31, "share": None}
    assert bench_ops.judge(row) == {"ratio": verdict, "memory": "no", "share": "unknown"}


def test_losses_that_differ_have_no_figures():
    result = timing.Comparison(["fastgpt", "nanogpt"])
    for name, loss in (("fastgpt", 4.61), ("nanogpt", 4.60)):
        result.samples[name] = [timing.Sample(1.0, values={"loss": loss})]
    heads = {name: {"first_loss": 4.7} for name in result.samples}
    bench_train.check_losses(result, heads, "float32")
    assert result.failures == {"fastgpt": "AssertionError: the loss of step 1 is 4.610000, expected 4.600000"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_training_variants_have_the_same_losses(dtype):
    config = training.MODELS["tiny"]
    losses = {}
    for variant in training.KINDS:
        step = training.stepper(*training.build(variant, config), dtype, 2, 8)
        losses[variant] = [step()["loss"] for _ in range(3)]
    for variant, curve in losses.items():
        assert curve == pytest.approx(losses["nanogpt"], rel=training.LOSS_TOLERANCE[dtype]), variant


def test_tokens_that_are_not_the_likeliest_have_no_figures():
    model = GPT(decoding.MODELS["tiny"]).eval()
    prompts = generation.random_prompts(101, 2, 5, 0)
    ids = model.generate(torch.tensor(prompts), 4, temperature=0.0)[:, 5:].tolist()
    contestants.check_tokens(model, prompts, ids)
    wrong = [ids[0], [*ids[1][:2], (ids[1][2] + 1) % 101, ids[1][3]]]
    with pytest.raises(timing.Failure, match="not the likeliest tokens: a token's logit is"):
        contestants.check_tokens(model, prompts, wrong)
    chance = generation.random_prompts(101, 2, 4, 1)
    with pytest.raises(timing.Failure, match="not the likeliest tokens: the tokens' logits are, in the mean,"):
        contestants.check_tokens(model, prompts, chance, mean_shortfall=contestants.MEAN_SHORTFALL["int4"])
    with pytest.raises(timing.Failure, match="outside of the vocabulary of 101"):
        contestants.check_tokens(model, prompts, [ids[0], [0, 1, 2, 101]], mean_shortfall=9.0)


def test_what_a_token_costs():
    config, found = decoding.MODELS["gpt2"], decoding.SCENARIOS
    matrices = 12 * 12 * 768 ** 2 + 50257 * 768
    assert decoding.matrix_bytes(config, "int4") * 2 == decoding.matrix_bytes(config, "int8") == matrices
    context = 32 + 64  # of the middle one of the new tokens
    assert decoding.cost(config, found["decode"], "float32", 4 * matrices) == {
        "bytes": 4 * matrices + 2 * 4 * 12 * 768 * context, "flops": 2 * matrices + 4 * 12 * 768 * context}
    batch = decoding.cost(config, found["batch"], "int8", matrices)
    assert batch["bytes"] == matrices / 16 + 2 * 2 * 12 * 768 * (128 + 32)
    # The head is wanted once for the whole prompt; a pair (i, j <= i) costs 4 C in each layer.
    prompt = decoding.cost(config, found["prefill"], "int8", matrices)
    pairs = 512 * 513 / 2
    assert prompt["flops"] * 512 == pytest.approx(2 * 12 * 12 * 768 ** 2 * 512 + 2 * 50257 * 768 + 4 * 12 * 768 * pairs)


def test_the_targets_of_a_row():
    assert decoding.targets("decode", "int8", 2) == {"best rival": 1.3, "share": 0.88, "transformers float32": 8.0}
    assert decoding.targets("decode", "int8", 1) == {"best rival": 1.8, "share": 0.88}
    assert decoding.targets("small", "float32", 2) == decoding.targets("batch", "int8", 1) == {}
    wanted = {"best rival": 1.3, "share": 0.9, "transformers float32": 8.0}
    spread = {"q1": 0, "q3": 9, "count": 3}
    found = {"best rival": {"median": 1.3, **spread}, "share": {"median": 0.89, **spread}, "transformers float32": None}
    assert decoding.verdicts(wanted, found) == {"best rival": "met", "share": "missed", "transformers float32": "unknown"}
    every = {dtype for table in decoding.BEST_RIVAL.values() for dtype in table}
    assert every == set(peers.DTYPES) == set(decoding.SHARES)


def test_a_prompt_that_is_ahead_does_not_flatter_the_others(monkeypatch):
    class Engine:
        def generate(self, prompts, new):  # the second prompt waits until the first one has two of its three tokens
            return [[7] * 3] * 2, [[1.0, 2.0, 3.0], [2.5, 3.5, 4.5]]

    monkeypatch.setattr(time, "perf_counter", lambda: 0.5)
    ids, values = generation.timed(Engine(), [[1], [2]], 3)
    assert ids == [[7] * 3] * 2 and values == {"first_seconds": 2.0, "token_seconds": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match=r"gave \[3, 3\] ids at \[3, 3\] times, expected 4"):
        generation.timed(Engine(), [[1], [2]], 4)


def test_the_best_rival_is_the_fastest_of_the_same_dtype():
    models = contestants.Models("nowhere", {}, None)
    engines = [contestants.Contestant(name, (*kind, 2), decoding.SCENARIOS["decode"], models, 30.0) for name, *kind in (
        ("fastgpt", "fastgpt", "int8"), ("llama.cpp", "llama.cpp", "int8"), ("onnxruntime", "onnxruntime", "int8"),
        ("transformers float32", "transformers", "float32"))]
    result = timing.Comparison([engine.name for engine in engines])
    for engine, seconds in zip(engines, (1.0, 1.4, 1.2, 0.9)):
        result.samples[engine.name] = [timing.Sample(1.0, values={"token_seconds": seconds})] * 3
    row = {"share": None}
    bench_generate._compare_ours(row, engines, ("decode", "int8", 2), result)
    assert row["best"] == "onnxruntime" and row["ratios"]["onnxruntime"]["median"] == 1.2
    assert row["verdicts"] == {"best rival": "missed", "share": "unknown", "transformers float32": "missed"}
    result.fail("fastgpt", timing.Failure("wrong tokens"))
    bench_generate._compare_ours(row, engines, ("decode", "int8", 2), result)
    assert row["best"] is None and not row["ratios"] and set(row["verdicts"].values()) == {"unknown"}


def test_an_engine_that_is_not_there_says_so(alone, tmp_path):
    options = ["--make", "llama.cpp", "f32", "no source", str(tmp_path / "new")]
    body = f"import sys; sys.modules['gguf'] = None; from benchmarks import generation; generation.main({options})"
    process = Process("child", [sys.executable, "-c", body], env={"PYTHONPATH": str(ROOT)}, log=tmp_path / "log")
    nowhere = Process("elsewhere", ["/no/such/python"])
    result = timing.compare([process, nowhere], rounds=1, neighbours=alone)
    process.close()
    nowhere.close()
    assert result.failures == {"child": "gguf is not installed: pip install '.[peers]'",
                               "elsewhere": "/no/such/python can't be started: No such file or directory"}
    assert "ModuleNotFoundError" in (tmp_path / "log").read_text()


def test_an_engine_that_is_too_slow_is_not_started_again(monkeypatch, alone, tmp_path):
    models = contestants.Models(tmp_path, {}, tmp_path / "log")
    scenario = decoding.SCENARIOS["tiny"]
    engine, again = (contestants.Contestant("x", ("transformers", "float32", 1), scenario, models, cap)
                     for cap in (0.0, 30.0))
    engine.limit = 60.0
    result = timing.compare([engine], rounds=1, neighbours=alone)
    engine.close()
    slow = result.failures["x"]
    assert slow.startswith("a run takes ") and slow.endswith(" s, over the cap of 0 s")
    result = timing.compare([again], rounds=1, neighbours=alone)
    assert result.failures == {"x": f"not started: in 2 x 5 + 4, {slow}"}
    assert again.child is None


def test_a_child_can_be_spared_a_variable(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert "OMP_WAIT_POLICY" not in Process("child", [], env={"OMP_WAIT_POLICY": None}).env
    assert Process("child", []).env["OMP_WAIT_POLICY"] == "passive"


def test_flops_of_a_training_step():
    # 124 million parameters, 6 each, and 14 million for attention at 256 tokens: 757 million a token.
    assert bench_train.flops_per_token(training.MODELS["gpt2"], 256) == pytest.approx(756e6, rel=0.005)


def test_pytorch_is_not_started_where_a_step_would_take_too_long(monkeypatch, alone):
    settings = bench_train.parse(["--model", "tiny", "--variants", "fastgpt", "nanogpt", "--cap", "100"])[0]
    monkeypatch.setattr(bench_train, "pytorch_seconds", lambda dtype, flops: 101.0)
    processes, left_out = bench_train.children(settings, "bfloat16", 1)
    assert [process.name for process in processes] == ["fastgpt"]
    assert "a step would take about 101 s, over the cap of 100 s" in left_out["nanogpt"]
    settings["rounds"], settings["batch"], settings["length"] = 1, 1, 4
    ours, theirs = bench_train.measure(settings, "bfloat16", 1, alone, curve=[9.0])
    assert "the loss of step 0 is 4." in ours["failure"] and theirs["failure"] == left_out["nanogpt"]


def test_the_machine_line():
    found = machine.describe()
    assert found["versions"]["torch"] == torch.__version__ and found["cpus"] >= 1
    assert str(ROOT) not in json.dumps(found)
    assert machine.one_line(found).startswith(found["cpu"])


@needs_extension
def test_bench_ops_runs_and_reports(tmp_path, run_script):
    options = ["--sizes", "tiny", "--quick", "--threads", "1", "--dtypes", "float32"]
    found = run_script(bench_ops, *options, "--ops", "layer_norm", "cross_entropy")
    assert {row["op"] for row in found["rows"]} == {"layer_norm", "cross_entropy"}
    assert any(row.get("peak_mb") for row in found["rows"])
    assert {row["implementation"] for row in found["rows"]} == {"cpp"}
    for row in found["rows"]:
        assert not row["failures"] and row["seconds"]["median"] > 0 and row["share"]["median"] > 0 and row["ratio"]
    assert {row["ceiling"] for row in found["ceilings"]} >= {"float32 FMA", "L2 read", "L3 read", "memory read"}
    _report(found, tmp_path)


@needs_extension
def test_bench_train_runs_and_reports(tmp_path, run_script):
    options = ["--model", "tiny", "--batch", "2", "--length", "8", "--threads", "1", "--quick", "--dtypes", "float32"]
    found = run_script(bench_train, *options, "--variants", "fastgpt", "nanogpt")
    assert [row["variant"] for row in found["rows"]] == ["fastgpt", "nanogpt"]
    for row in found["rows"]:
        assert row["failure"] is None and row["tokens_per_second"]["median"] > 0 and row["losses"][0] < 5
        assert row["peak_mb"] is None or row["peak_mb"] > row["base_mb"] > 10
    assert found["rows"][0]["ratios"]["nanogpt"]["median"] > 0
    _report(found, tmp_path)


@needs_extension
def test_bench_generate_runs_and_reports(tmp_path, run_script):
    found = run_script(bench_generate, "--scenarios", "tiny", "--dtypes", "float32", "int8", "--threads", "1", "--quick",
                       "--rivals", "transformers", "llama.cpp", "--python", "llama.cpp=/no/such/python")
    rows = {(row["variant"], row["dtype"]): row for row in found["rows"]}
    for kind in (("fastgpt", "float32"), ("fastgpt", "int8"), ("transformers", "float32")):
        row = rows.pop(kind)
        assert row["failure"] is None and row["decode_tokens_per_second"]["median"] > 0 and row["version"]
        assert row["weight_bytes"] > 0 and row["cost"]["flops"] > 0 and set(row["floors"]) >= {row["ceiling"]}
        assert row["share"]["median"] > 0 and (row["peak_mb"] is None or row["peak_mb"] > 10)
        assert set(row["ratios"]) == ({"transformers"} if kind == ("fastgpt", "float32") else set())
    assert {kind: row["failure"] for kind, row in rows.items()} == {
        ("transformers", "int8"): "transformers has no int8 here",
        ("llama.cpp", "float32"): "/no/such/python can't be started: No such file or directory",
        ("llama.cpp", "int8"): "/no/such/python can't be started: No such file or directory"}
    _report(found, tmp_path)
    assert "- llama.cpp: /no/such/python can't" in report.table(found)


def test_quality_of_the_dtypes(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 100)
    monkeypatch.setattr(sys, "argv", ["bench_quality", str(tmp_path / "text.txt"), "--windows", "1"])
    bench_quality.main()
    found = results.check(json.loads(capsys.readouterr().out.splitlines()[-1]))
    rows = {(row["model"], row["dtype"]): row for row in found["rows"]}
    assert len(rows) == 8
    for (_, dtype), row in rows.items():
        assert (row["kl"] == 0 and row["top_1"] == 1) if dtype == "float32" else 0 < row["kl"] < 0.1
        assert set(row["verdicts"]) == ({"perplexity"} if dtype.startswith("int") else set())
    assert "| plain | int8 |" in report.table(found)


def _report(found, folder):
    """The README's table and the plot of a document."""
    readme = "before\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nafter\n"
    filled = report.fill(readme, {"x": found})
    assert filled.startswith("before\n<!-- bench:x -->\n| ") and filled.endswith("<!-- /bench:x -->\nafter\n")
    assert "old" not in filled and found["machine"]["date"] in filled
    assert report.fill(filled, {"x": found}) == filled
    plots.save(found, folder / "x.png")
    assert (folder / "x.png").stat().st_size > 1000


def test_markers_without_a_document_or_an_end_are_errors():
    with pytest.raises(ValueError, match="bench:ops has no benchmarks/results/ops.json"):
        report.fill("<!-- bench:ops -->\n<!-- /bench:ops -->", {})
    with pytest.raises(ValueError, match="no end of the same name"):
        report.fill("<!-- bench:ops -->\n<!-- /bench:train -->", {})


@pytest.mark.parametrize("path", report.READMES, ids=str)
def test_kept_results_and_the_readmes_agree(path):
    documents, text = results.load_all(), path.read_text()
    missing = report.markers(text) - set(documents)
    if missing:
        pytest.skip(f"no results are kept for {', '.join(sorted(missing))}")
    assert report.fill(text, documents) == text, "run python -m benchmarks.report"


def test_a_document_without_its_fields_is_refused():
    good = {"schema": 1, "benchmark": "ops", "machine": {}, "settings": {}, "ceilings": [], "rows": []}
    assert results.check(good) == good
    for change, message in (({"rows": None}, "rows must be a list"), ({"schema": 2}, "schema 2, expected 1"),
                            ({"rows": [{"seconds": {"median": 1}}]}, "seconds must have")):
        with pytest.raises(ValueError, match=message):
            results.check({**good, **change})
