"""benchmarks/gpu_decoding.py and gpu_kernels.py where there is no GPU: engines in this process, simulated kernels, a fake
timer."""
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cuda_shim
import pytest
import torch
from versions import simulable

pytest.importorskip("triton")
pytestmark = [pytest.mark.skipif(bool(cuda_shim.missing()), reason=str(cuda_shim.missing())),
              pytest.mark.skipif(not simulable(), reason="needs the triton that the interpreter knows"),
              pytest.mark.usefixtures("one_thread")]
sys.path.append(str(Path(__file__).parents[2]))

from cuda_executors import Shim, running_cuda
from plain_device import plain_gpu
from test_gpu_benchmarks import FakeTimer

from benchmarks import bench_gpu, decoding, generation, gpu_decoding, gpu_kernels, gpu_timing, results, timing
from benchmarks.contestants import MEAN_SHORTFALL, Models, check_tokens
from benchmarks.decoding import Scenario
from benchmarks.gpu_kernels import TINY, attention_case, draw_case, linear_case
from benchmarks.peers import GPU_RIVALS, OURS, static_cache
from benchmarks.processes import Process
from fastgpt import reference, torch_sampling
from fastgpt.cuda import paged, sampling, weight_only

TOPS = [{"ceiling": "copy", "rate": {"median": 1e9}}, {"ceiling": "matmul", "rate": {"median": 1e12}}]


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Here PyTorch's own numbers count: its outputs stay as they are."""


class Child:
    """benchmarks.generation in this process, for whoever waits for its messages."""

    def __init__(self, arguments):
        making = arguments[0] == "--make"
        try:
            (generation.make if making else generation.serve)(self, *arguments[making:])
        except Exception as error:
            self.head, self.step = {"failed": generation.reason(error, "somewhere")}, None
            if not isinstance(error, (ImportError, RuntimeError)):
                raise

    def serve(self, step, **head):
        self.step, self.head = step, head


@pytest.fixture
def children(monkeypatch):
    """Rivals run on the CPU; ours asks for "cuda", which is what plain_gpu makes of it."""
    def prepare(process):
        arguments = process.command[3:]
        if len(arguments) > 5 and arguments[0] != OURS:
            arguments[2] = "1"
        process.child = Child(arguments)
        process.head = process.child.head
        if "failed" in process.head:
            raise timing.Failure(process.head["failed"])

    monkeypatch.setattr(Process, "prepare", prepare)
    monkeypatch.setattr(Process, "sample", lambda process, evict=None: timing.Sample(1.0, values=process.child.step()))
    monkeypatch.setattr(Process, "close", lambda process, kill=False: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


class Vllm:
    """vLLM's documented calls on transformers' GPT-2: a token for each request in every step, told with those before."""

    __version__ = "0"
    SamplingParams = staticmethod(lambda **given: SimpleNamespace(**given))

    def __init__(self, model, *, dtype, skip_tokenizer_init, enable_prefix_caching, gpu_memory_utilization):
        import transformers
        assert skip_tokenizer_init and not enable_prefix_caching and 0 < gpu_memory_utilization < 1
        self.llm_engine, self.requests = self, {}
        self.model = transformers.GPT2LMHeadModel.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def add_request(self, name, prompt, params):
        assert name not in self.requests and params.temperature == 0 and params.ignore_eos and not params.detokenize
        self.requests[name] = prompt["prompt_token_ids"], [], params.max_tokens

    def has_unfinished_requests(self):
        return bool(self.requests)

    @torch.no_grad()
    def step(self):
        outputs = []
        for name, (prompt, ids, most) in list(self.requests.items()):
            ids.append(int(self.model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
            outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tuple(ids))]))
            if len(ids) == most:
                del self.requests[name]
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.delitem(sys.modules, "benchmarks.peers.vllm", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Vllm, SamplingParams=Vllm.SamplingParams, __version__="0"))


def test_generation_runs(children, vllm, monkeypatch, capsys):
    """All engines at a batch and at a prompt alone, ours on the simulated kernels."""
    monkeypatch.setitem(decoding.SCENARIOS, "prompt", Scenario("tiny", 1, 13, 1))
    monkeypatch.setattr(generation, "CHECKED_TOKENS", 6)
    part = partial(gpu_decoding.rows, scenarios=["tiny", "prompt"], dtypes=["float32", "int8"])
    with plain_gpu() as device:
        tops, rows = bench_gpu.run(FakeTimer(), {"generation": part}, "cpu", False)
        assert device.replays > device.captures > 0
    json.dumps(results.check(results.document("gpu", {}, tops, rows)))
    found = {(row["spec"], row["dtype"], row["contestant"]): row for row in rows}
    assert len(rows) == len(found) == 2 * 2 * 4
    without = {key: row["failure"] for key, row in found.items() if row["failure"]}
    assert without == {(f"generation, {name}", "int8", engine): f"{engine} has no int8 here"
                       for name in ("tiny", "prompt") for engine in ("transformers", "vllm")}
    for key, row in found.items():
        if key not in without:
            assert row["seconds"]["count"] == 3 and row["share"]["median"] > 0 and row["shortfall"] < 0.05, row
            assert row["ceiling"] == "copy" or row["dtype"] != "float32"
            assert row["same_tokens"] >= (6 if row["dtype"] == "float32" else 1), "of equal weights, or nearly"
            assert (row["ratio"] is None) == (row["contestant"] == OURS)
    prompt, batch = (found[f"generation, {name}", "float32", OURS] for name in ("prompt", "tiny"))
    assert prompt["tokens_per_second"] == prompt["prefill_tokens_per_second"] != batch["tokens_per_second"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in (OURS, *GPU_RIVALS)) and "tokens/s" in printed and "% of copy" in printed


def test_what_is_missing_or_wrong_has_no_figures(children, monkeypatch, tmp_path):
    """transformers with a token that is not the likeliest, no vllm, and none of our kernels here."""
    from benchmarks.peers import transformers
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.vllm", raising=False)
    right = transformers.Engine.generate
    monkeypatch.setattr(transformers.Engine, "generate", lambda *call: (
        [[(row[0] + 1) % 101, *row[1:]] for row in right(*call)[0]], right(*call)[1]))
    calls = gpu_timing.ceiling_calls(FakeTimer(), "cpu", 1 << 10, 8)
    rows = gpu_decoding.measure(Models(tmp_path, {}, None), ("tiny", "float32"), FakeTimer(), calls)
    reasons = {row["contestant"]: row["failure"] for row in rows}
    assert "no CUDA device" in reasons[OURS] or torch.cuda.is_available()
    assert reasons["transformers"].startswith("not the likeliest tokens")
    assert reasons["vllm"] == "vllm is not installed: pip install somewhere" and reasons["torch.compile"] is None
    assert [bool(row["seconds"]) for row in rows] == [False, False, True, False]


def test_rates_shares_and_tokens_that_agree():
    scenario, calls = Scenario("gpt2", 2, 8, 3), gpu_timing.ceiling_calls(FakeTimer(), "cpu", 1 << 10, 8)
    engines = [SimpleNamespace(name=name, scenario=scenario, precision="bfloat16", shortfall=0.0,
                               head={"weight_bytes": 1000, "ids": ids})
               for name, ids in ((OURS, [[1, 2, 3], [4, 5, 6]]), ("x", [[1, 2, 3], [4, 6, 6]]), ("y", [[1, 2, 3], [7, 5, 6]]))]
    result = timing.Comparison([OURS, "x", "y", "copy", "matmul"])
    result.fail("y", timing.Failure("late"))
    for _ in range(3):
        result.samples[OURS].append(timing.Sample(1.0, values={"token_seconds": 1e-3, "first_seconds": 2e-3}))
        result.samples["x"].append(timing.Sample(1.0, values={"token_seconds": 3e-3, "first_seconds": 8e-3}))
        result.samples["copy"].append(timing.Sample(1e-5))
        result.samples["matmul"].append(timing.Sample(1e-12))
    ours, x, y = (gpu_decoding._row(engine, ("many", "bfloat16"), result, calls, engines[0].head) for engine in engines)
    assert (ours["same_tokens"], x["same_tokens"], y["same_tokens"]) == (3, 1, 0)
    assert ours["tokens_per_second"]["median"] == 1000 and ours["prefill_tokens_per_second"]["median"] == 16 / 2e-3
    assert x["ratio"]["median"] == 3 and ours["ratio"] is None and y["failure"] == "late" and y["seconds"] is None
    moved = 1000 / 2 + 2 * 2 * 12 * 768 * 9.5  # bytes of a token, by 2048 that a copy moves in 10 us
    assert ours["ceiling"] == "copy" and ours["cost"]["bytes"] == moved
    assert ours["share"]["median"] == pytest.approx(moved / 2048 * 1e-5 / 1e-3)
    result.samples["matmul"] = [timing.Sample(1.0)] * 3
    assert gpu_decoding._row(engines[0], ("many", "bfloat16"), result, calls, None)["ceiling"] == "matmul"
    assert gpu_decoding._row(engines[0], ("many", "float32"), result, calls, None)["ceiling"] == "copy"


def test_a_static_cache_is_used_again(children, tmp_path):
    """Also for fewer tokens, and after other sequences; the model is one whose vectors count too."""
    models, prompts = Models(tmp_path, {}, None), generation.random_prompts(101, 2, 9, 0)
    for parameter in models.model("tiny").parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    engine, int8 = (static_cache.Engine(models.source("tiny"), None, precision, 1) for precision in ("float32", "int8"))
    ids = engine.generate(prompts, 8)[0]
    check_tokens(models.model("tiny"), prompts, ids)
    check_tokens(models.model("tiny"), prompts, int8.generate(prompts, 8)[0], MEAN_SHORTFALL["int8"])
    keys = engine.model.layers[0].k
    assert engine.generate(generation.random_prompts(101, 2, 9, 1), 3)[0] != ids
    assert engine.generate(prompts, 5)[0] == [row[:5] for row in ids] and engine.model.layers[0].k is keys
    assert engine.model.room == (2, 24) and engine.generate(prompts[:1], 30)[0][0][:8] == ids[0]


def test_kernels_run(one_thread):
    with running_cuda(Shim()):
        rows = list(gpu_kernels.rows(FakeTimer(), TOPS, "cpu", False))
    found = {(row["spec"], row["contestant"]): row for row in rows}
    assert len(found) == len(rows) and {row["op"] for row in rows} == {"paged_attention", "weight_only", "sample"}
    for (spec, contestant), row in found.items():
        if contestant == gpu_timing.FLASH:
            assert row["failure"].startswith("ModuleNotFoundError" if "bfloat16" in spec else "flash-attn has no cache of")
        else:
            assert row["failure"] is None and row["seconds"]["median"] == 1e-3 and row["ceiling"] == "copy", row
            assert row["share"]["median"] == pytest.approx(row["bytes"] / 1e9 / 1e-3)
    numbers, S, H, D = 3 * 40 * 2 * 16, 40, 2, 16
    assert found["paged_attention, bfloat16", OURS]["bytes"] == 2 * 2 * numbers
    assert found["paged_attention, int8", OURS]["bytes"] == 2 * (numbers + 4 * 3 * S * H)
    assert found["paged_attention, int8", "pytorch"]["bytes"] == 2 * 2 * numbers and D == 16
    tiles = 48 * 64  # 33 outputs in tiles of 16, 40 channels in one of 64
    assert found["weight_only, int8 head", OURS]["bytes"] == tiles + 4 * 33 + 2 * (2 * 40 + 2 * 33)
    assert found["sample, all", OURS]["bytes"] == 4 * 4 * 65


def test_the_calls_at_gpt2s_sizes():
    """What is there for a GPU; nothing is made here."""
    found = list(gpu_kernels.cases(gpu_kernels.GPT2, "cuda"))
    assert len(found) == 2 * 3 + 2 * 5 * 3 + 2 * 3
    assert {make.args[1] for make in found if make.func is attention_case} == {8, 64}


class FlashDecoding:
    """flash-attn's documented function for one query of each sequence."""

    @staticmethod
    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, causal):
        assert causal and q.shape[1] == 1 and k_cache.shape[1] % 256 == 0
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        keys, values = (cache[block_table.long()].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
        seen = torch.arange(keys.shape[2]) < cache_seqlens[:, None]
        return reference.attention(q.transpose(1, 2), keys, values, causal=False, key_mask=seen).transpose(1, 2)


def test_flash_attention_is_asked_for_the_same_function(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashDecoding)
    with running_cuda(Shim()):
        case = attention_case(TINY, 3, "bfloat16", "cpu")
        assert set(case.calls) == {OURS, "pytorch", "flash-attn"} and not gpu_kernels._wrong(case)


def wrong(monkeypatch, module, name, change):
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **options: change(right(*given, **options)))


@pytest.mark.parametrize(("make", "module", "name", "change", "message"), [
    (partial(attention_case, TINY, 3, "int8"), paged, "attend", lambda out: 1.05 * out, "paged_attention"),
    (partial(linear_case, TINY, "int4", "head", 2), weight_only, "weight_only_linear", lambda out: 1.05 * out,
     "weight_only_linear: norm-relative"),
    (partial(draw_case, TINY, 4, "all"), sampling, "sample", lambda ids: (ids + 1) % 65, "of 4 rows drew"),
    (partial(draw_case, TINY, 4, "top 50"), torch_sampling, "choose", lambda ids: ids - 99, "4 of 4 rows")],
    ids=["attention", "product", "draws", "their draws"])
def test_a_wrong_kernel_has_no_figures(monkeypatch, make, module, name, change, message):
    wrong(monkeypatch, module, name, change)
    with running_cuda(Shim()):
        rows = gpu_kernels.measure(make("cpu"), FakeTimer(), TOPS)
    bad, good = rows[:2] if module is not torch_sampling else rows[1::-1]
    assert message in bad["failure"] and bad["seconds"] is None and good["failure"] is None and good["seconds"]


def test_logits_are_the_same_in_every_call(monkeypatch):
    """Ours overwrites them."""
    seen = []
    right = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda logits, draws: seen.append(logits.clone()) or right(logits, draws))
    with running_cuda(Shim()):
        gpu_kernels.measure(draw_case(TINY, 4, "all", "cpu"), FakeTimer(runs=False), TOPS)
        case = draw_case(TINY, 4, "all", "cpu")
        contestant = gpu_timing.Contestant("x", case.calls[OURS][0], TimesNothing(), case.setup)
        for _ in range(2):
            contestant.sample()
    assert torch.equal(seen[-1], seen[-2])


class TimesNothing:
    def seconds(self, run):
        run()
        return 1.0


def test_a_part_that_breaks_keeps_its_rows_and_the_next_goes_on(capsys):
    row = {"spec": "s", "what": "w", "contestant": OURS, "seconds": None, "ratio": None, "failure": "f"}

    def breaks(timer, tops, device, gpt2):
        yield row
        raise torch.AcceleratorError("an illegal memory access\nwas encountered")
    rows = bench_gpu.run(FakeTimer(), {"kernels": breaks, "generation": lambda *given: iter([row])}, "cpu", False)[1]
    assert [r["failure"] for r in rows] == ["f", "AcceleratorError: an illegal memory access", "f"]
    assert "kernels" in capsys.readouterr().out


def test_what_can_be_asked_for(capsys):
    options = bench_gpu.parse(["--parts", "generation", "--dtypes", "int8", "--python", "vllm=/venv/bin/python"])
    assert options["parts"] == ["generation"] and options["scenarios"] == list(gpu_decoding.SCENARIOS)
    assert options["python"] == {"vllm": "/venv/bin/python"}
    with pytest.raises(SystemExit):
        bench_gpu.parse(["--python", "llama.cpp=x"])
    assert "expected RIVAL=PATH of transformers, torch.compile, vllm" in capsys.readouterr().err
