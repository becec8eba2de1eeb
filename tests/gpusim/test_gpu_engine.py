"""`fastgpt.LLM(device="cuda")` on the CPU's tensors, every kernel by its simulated twin: the same tokens as the CPU's engine."""
import copy
import random
import sys
import threading

import cuda_shim
import numpy as np
import pytest
import torch
from engines import V, prompt, small_model, with_outliers
from plain_device import plain_gpu
from versions import simulable

from fastgpt import LLM, SamplingParams, ops
from fastgpt.engine import gpu_runner, in_model

pytestmark = [pytest.mark.skipif(bool(cuda_shim.missing()), reason=str(cuda_shim.missing())),
              pytest.mark.skipif(not simulable(), reason="needs the triton that the interpreter knows")]
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def gpu():
    with plain_gpu() as device:
        yield device


def gpu_llm(model, dtype="float32", **options):
    return LLM(model, dtype, device="cuda", **{"kv_cache_tokens": 400, "page_size": 7, "warm_up": 0, **options})


def prompts(seed=0, lengths=(3, 40, 1, 17)):
    rng = np.random.default_rng(seed)
    return [prompt(rng, length) for length in lengths]


def ids(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 11}, {"kv_cache_tokens": 70}, {"page_size": 64}], ids=str)
def test_greedy_tokens_are_those_of_the_cpu(gpu, model, options):
    """Whole and cut prompts, waiting requests, prompts beside tokens."""
    assert ids(gpu_llm(model, **options).generate(prompts(), GREEDY)) == ids(LLM(model).generate(prompts(), GREEDY))
    assert gpu.captures and gpu.replays > gpu.captures


def test_drawn_tokens_are_those_of_the_cpu(gpu, model):
    """By the same seeds, with every knob, beside requests without any."""
    params = [SamplingParams(max_tokens=5, seed=3, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, n=3),
              SamplingParams(max_tokens=7, seed=4, temperature=1.2, repetition_penalty=1.3, frequency_penalty=0.4,
                             presence_penalty=0.2, logit_bias={3: 2.0, 5: -1.0}),
              GREEDY, SamplingParams(max_tokens=4, seed=2 ** 62 + 1)]
    assert ids(gpu_llm(model).generate(prompts(1), params)) == ids(LLM(model).generate(prompts(1), params))


def test_penalties_do_not_wait_for_the_token_before(gpu, model, monkeypatch):
    """Which is still on its way when the next step starts, and counts all the same."""
    events, step, download = [], gpu_runner.GpuRunner.step, gpu.download

    def downloaded(device, tensor):
        wait = download(device, tensor)
        return lambda: events.append("wait") or wait()
    monkeypatch.setattr(gpu_runner.GpuRunner, "step", lambda *args, **options: events.append("step") or step(*args, **options))
    monkeypatch.setattr(gpu, "download", downloaded)
    params = [SamplingParams(max_tokens=8 + i, temperature=0, repetition_penalty=5.0, ignore_eos=True) for i in range(3)]
    llm = gpu_llm(model)
    events.clear()
    found = llm.generate(prompts(1)[:3], params)
    assert events[:5] == ["step", "step", "wait", "step", "wait"]
    assert ids(found) == ids(LLM(model).generate(prompts(1)[:3], params))


@pytest.mark.parametrize("told", [[3, 3, 3, 3], [None, 5, None, 0]], ids=["of all", "of some"])
def test_log_probabilities(gpu, model, told):
    """Beside requests without any, of samples that part, with penalties, and to the end of each."""
    params = [SamplingParams(max_tokens=3 + i, seed=i, logprobs=count, n=1 + i % 2, repetition_penalty=1.2 if i == 3 else 1.0)
              for i, count in enumerate(told)]
    ours, theirs = (llm.generate(prompts(2), params) for llm in (gpu_llm(model), LLM(model)))
    assert ids(ours) == ids(theirs)
    for a, b, count in zip(ours, theirs, told):
        for mine, other in zip(a.outputs, b.outputs):
            assert (mine.logprobs is None) == (other.logprobs is None) == (count is None)
            for x, y in zip(mine.logprobs or (), other.logprobs or (), strict=True):
                assert x.keys() == y.keys() and len(x) >= count
                np.testing.assert_allclose(list(x.values()), list(y.values()), atol=2e-5)


@pytest.fixture
def waits(monkeypatch):
    """The names of the tensors' methods that wait for the device, as the engine calls them."""
    found = []

    def watched(name, right):
        def call(*arguments, **options):
            if sys._getframe(1).f_globals["__name__"].startswith(("fastgpt.engine", "fastgpt.cuda", "fastgpt.torch_sampling")):
                found.append(name)
            return right(*arguments, **options)
        return call
    for name in ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    return found


def test_a_step_waits_for_nothing(gpu, model, waits):
    """But for the tokens of the step before, which a download brings."""
    params = [GREEDY, SamplingParams(max_tokens=5, seed=3, n=3), SamplingParams(max_tokens=4, presence_penalty=0.5, logprobs=2),
              SamplingParams(max_tokens=6, logprobs=4)]
    llm = gpu_llm(model)
    assert [len(out.outputs[0].token_ids) for out in llm.generate(prompts(3), params)] == [6, 5, 4, 6] and waits == []
    llm.logits(prompts(3)[0])
    assert waits, "they are seen"


def test_how_tokens_are_drawn_is_told_the_device_when_it_changes(gpu, model, monkeypatch):
    told, right = [], gpu_runner.draws_of
    monkeypatch.setattr(gpu_runner, "draws_of", lambda drawn, device: told.append(len(drawn)) or right(drawn, device))
    params = [SamplingParams(max_tokens=count, seed=count) for count in (12, 5, 12, 12)]
    assert ids(gpu_llm(model).generate(prompts(13), params)) == ids(LLM(model).generate(prompts(13), params))
    assert told == [4, 3]


def test_graphs_are_there_before_the_first_request(gpu, model, monkeypatch):
    monkeypatch.setattr(gpu_runner, "LADDER", (1, 2, 4, 8, 16))
    llm = gpu_llm(model, warm_up=5)
    assert list(llm.runner._graphs) == [8, 4, 2, 1] and gpu.captures == 4 and llm.free_pages == 58
    assert ids(llm.generate(prompts(), GREEDY)) == ids(LLM(model).generate(prompts(), GREEDY)) and gpu.captures == 4
    assert list(gpu_llm(model, kv_cache_tokens=14).runner._graphs) == []
    assert list(LLM(model, "float32", device="cuda", kv_cache_tokens=14, page_size=7).runner._graphs) == [2, 1], "pages for two"
    with pytest.raises(ValueError, match="warm_up"):
        gpu_llm(model, warm_up=-1)


def test_a_warm_up_draws_nothing_and_minds_no_broken_model(gpu, model):
    before, broken = random.getstate(), copy.deepcopy(model)
    broken.transformer.ln_f.weight.data.fill_(float("nan"))
    llm = gpu_llm(broken, warm_up=2)
    assert random.getstate() == before and np.isnan(llm.logits([1, 2])).all()


def test_logits(gpu, model):
    for text in prompts(3, (1, 50)):
        np.testing.assert_allclose(gpu_llm(model).logits(text), LLM(model).logits(text), atol=2e-5)


@pytest.mark.parametrize(("dtype", "cache"), [("bfloat16", None), ("float16", "float8"), ("int8", None), ("int4", "int8")])
def test_every_dtype(gpu, model, dtype, cache):
    """Logits as far from float32's as the CPU's engine has them with such weights, and the bfloat16 of what they multiply."""
    text = prompts(4, (30,))[0]
    llm = gpu_llm(model, dtype, kv_cache_dtype=cache)
    expected, found = LLM(model).logits(text), llm.logits(text)
    def error(logits):
        return np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    allowed = {"bfloat16": 0.02, "float16": 0.05}  # the latter's keys are float8
    assert error(found) < (allowed.get(dtype) or 0.02 + 1.2 * error(LLM(model, dtype).logits(text)))
    assert len(llm.generate([text], GREEDY)[0].outputs[0].token_ids) == 6


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_outlier_channels_do_not_cost_the_others(gpu, model, dtype):
    text = prompts(4, (30,))[0]

    def error(model):
        expected = LLM(model).logits(text)
        return np.linalg.norm(gpu_llm(model, dtype).logits(text) - expected) / np.linalg.norm(expected)

    assert error(with_outliers(model, 100.0)) < 1.5 * error(model)


def test_an_end_is_noticed_one_step_later_and_not_told(gpu, model):
    """Sequences that end by an id have drawn one token more by then: it is dropped, and every page is free again."""
    greedy = LLM(model).generate(prompts(5), SamplingParams(max_tokens=12, temperature=0))
    ends = [out.outputs[0].token_ids[i] for out, i in zip(greedy, (2, 5, 0, 3))]
    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=ends)
    llm = gpu_llm(model)
    ours, theirs = llm.generate(prompts(5), params), LLM(model).generate(prompts(5), params)
    assert ids(ours) == ids(theirs)
    assert {o.outputs[0].finish_reason for o in ours} == {"stop"}
    assert llm.free_pages == llm._reservations.pages.num_pages


def test_streams_and_threads(gpu, model):
    """Two threads on one engine, one of which stops listening."""
    llm, found = gpu_llm(model), {}

    def work(name, seed):
        found[name] = ids(llm.generate(prompts(seed), GREEDY))
    threads = [threading.Thread(target=work, args=(name, name)) for name in (6, 7)]
    for thread in threads:
        thread.start()
    for number, _ in enumerate(llm.stream(prompts(8), GREEDY)):
        if number == 5:
            break
    for thread in threads:
        thread.join()
    for seed in (6, 7):
        assert found[seed] == ids(LLM(model).generate(prompts(seed), GREEDY))
    tokens = [out.token_id for out in llm.stream(prompts(9)[:1], GREEDY)]
    assert [[tokens]] == ids(LLM(model).generate(prompts(9)[:1], GREEDY))
    assert llm.free_pages == llm._reservations.pages.num_pages


def test_batches_are_padded_to_the_ladder(gpu, model, monkeypatch):
    """The spare rows write to a page of their own, and change nothing."""
    monkeypatch.setattr(gpu_runner, "LADDER", (4, 8))
    many = prompts(10, (5, 3, 2, 4, 6))
    params = [SamplingParams(max_tokens=count, temperature=0) for count in (3, 6, 6, 4, 6)]
    assert ids(gpu_llm(model).generate(many, params)) == ids(LLM(model).generate(many, params))
    assert gpu.captures == 2  # five sequences, then four and fewer


def test_more_sequences_than_the_ladder_has(gpu, model, monkeypatch):
    monkeypatch.setattr(gpu_runner, "LADDER", (1, 2))
    many = prompts(11, (5, 3, 2))
    assert ids(gpu_llm(model).generate(many, GREEDY)) == ids(LLM(model).generate(many, GREEDY))


def test_a_broken_model_is_told_and_frees_its_pages(gpu):
    broken = small_model()
    with torch.no_grad():
        broken.transformer.ln_f.weight[3] = float("nan")
    llm = gpu_llm(broken)
    with pytest.raises(ValueError, match="not finite"):
        llm.generate(prompts(), GREEDY)
    assert llm.free_pages == llm._reservations.pages.num_pages


def test_devices_and_dtypes_are_checked(model):
    with pytest.raises(ValueError, match="device must be"):
        LLM(model, device="tpu")
    with pytest.raises(ValueError, match="threads"):
        LLM(model, device="cuda", threads=2)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            LLM(model, device="cuda")
    with plain_gpu():
        for arguments, name in (({"dtype": "int2"}, "dtype"), ({"kv_cache_dtype": "float64"}, "kv_cache_dtype"),
                                ({"page_size": 0}, "page_size")):
            with pytest.raises(ValueError, match=name):
                LLM(model, device="cuda", **{"dtype": "float32", **arguments})
    assert V == model.config.vocab_size


def test_a_model_generates_on_it(gpu, model, monkeypatch):
    """`GPT.generate` of a model on a GPU: its own weights, so that what becomes of them is seen at once."""
    own, text = small_model(), torch.tensor([prompts()[0]])
    expected = own.generate(text, 8, temperature=0.0)
    monkeypatch.setattr(in_model, "device_of", lambda model: "cuda")
    monkeypatch.setattr(in_model, "KERNELS", {"cuda": "triton"})
    assert in_model.why_not(own) is None
    assert torch.equal(own.generate(text, 8, temperature=0.0), expected)
    with torch.no_grad():
        own.transformer.h[0].mlp.c_fc.weight.mul_(-1)
    changed = own.generate(text, 8, temperature=0.0)
    monkeypatch.undo()
    assert not torch.equal(changed, expected) and torch.equal(own.generate(text, 8, temperature=0.0), changed)


@pytest.fixture
def on_gpu(gpu, monkeypatch):
    """Models' weights are said to be on a GPU."""
    monkeypatch.setattr(in_model, "device_of", lambda model: "cuda")
    monkeypatch.setattr(in_model, "KERNELS", {"cuda": "triton"})


def test_a_model_draws_by_pytorchs_generator(on_gpu, waits):
    """Which is asked for a seed for each prompt, once, on the host."""
    own, text = small_model(), torch.tensor([prompts()[0]] * 2)

    def drawn(seed):
        torch.manual_seed(seed)
        return own.generate(text, 8, top_k=9, n=2)
    first = drawn(5)
    assert torch.equal(first, drawn(5)) and len({tuple(row.tolist()) for row in (*first, *drawn(6))}) == 8
    torch.manual_seed(5)
    seeds = torch.randint(2 ** 63 - 1, (2,)).tolist()
    assert torch.equal(own.generate(text, 8, top_k=9, n=2, seed=seeds), first)
    torch.manual_seed(5)
    own.generate(text, 8, temperature=0)
    assert torch.randint(2 ** 63 - 1, (2,)).tolist() == seeds, "greedy tokens leave it alone"
    assert set(waits) == {"tolist"}, "of the seeds and the prompts, which the host has"


def test_the_reference_is_refused(gpu, model):
    llm = gpu_llm(model)
    with ops.backend("reference"):
        for call in (lambda: gpu_llm(model), lambda: llm.generate(prompts(), GREEDY), lambda: llm.logits([1]),
                     lambda: next(llm.stream(prompts(), GREEDY))):
            with pytest.raises(RuntimeError, match="'reference' was asked for"):
                call()


def test_sizes_that_the_kernels_lack_are_refused(gpu, monkeypatch):
    wide = small_model(n_head=1, n_embd=320)
    with pytest.raises(ValueError, match="heads of up to 256, not 320"):
        gpu_llm(wide)
    monkeypatch.setattr(in_model, "device_of", lambda model: "cuda")
    monkeypatch.setattr(in_model, "KERNELS", {"cuda": "triton"})
    assert "heads of up to 256" in in_model.why_not(wide)


def test_what_the_caller_switched_on_changes_nothing(gpu, model):
    text = prompts(12, (20,))[0]
    llm = gpu_llm(model)
    expected = llm.logits(text)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(llm.logits(text), expected)
