"""`fastgpt.LLM`: its tokens against the model's own logits, every way to end, errors that leave it usable, no leaks."""
import gc
import threading

import numpy as np
import pytest
import torch
from engines import Recorder, V, as_packed, floats, logits_of, prompt, small_model, with_outliers

from fastgpt import GPT, LLM, SamplingParams, Tokenizer
from fastgpt.engine.pages import OutOfPages
from fastgpt.extension import _C
from fastgpt.loading import SHIPPED

DOTS = _C.engine_dots() if _C else ""
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
RNG = np.random.default_rng(1)
PROMPTS = [prompt(RNG, length) for length in (1, 9, 40, 140)]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, page_size=16)


@pytest.fixture(autouse=True)
def all_pages_come_back(request):
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm")
        engine._reservations.pages.check()
        assert engine.free_pages == engine._reservations.pages.num_pages
        assert engine._reservations.promised == 0


SWITCHES = [{}, {"bias": False}, {"tie_word_embeddings": False}, {"activation": "relu"}, {"activation": "gelu_new"},
            {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"layer_norm_epsilon": 1e-2},
            {"n_embd": 64, "n_head": 1, "n_inner": None}, {"n_embd": 6, "n_head": 2, "n_inner": 1, "vocab_size": 61}]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_logits_equal_the_models(level, changes):
    model = small_model(**changes)
    double = small_model(**changes).double()
    llm = Recorder(model, page_size=16)
    llm.generate(PROMPTS, GREEDY)
    for tokens, row in llm.seen.items():
        truth = logits_of(double, list(tokens))
        theirs = np.abs(logits_of(model, list(tokens)) - truth).max()
        assert np.abs(floats(row) - truth).max() <= 3 * theirs + 1e-5 * np.abs(truth).max()


# What the rows' own rounding costs beside the weights': none, 16 bits a row, 8 bits a group of 32.
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02 if "bf16" in DOTS else 2e-5),
                                                  ("int8", 0.2 if "vnni" in DOTS else 2e-3), ("int4", 0.2)])
def test_logits_are_those_of_the_weights_as_packed(level, model, dtype, tolerance):
    llm = Recorder(model, dtype, kv_cache_dtype="float32")
    twin = as_packed(llm, model)
    llm.generate(PROMPTS, GREEDY)
    for tokens, row in llm.seen.items():
        truth = logits_of(twin, list(tokens))
        assert np.linalg.norm(floats(row) - truth) < tolerance * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_outlier_channels_do_not_cost_the_others(level, model, dtype):
    def error(model):
        llm = Recorder(model, dtype)
        llm.generate(PROMPTS, GREEDY)
        both = [(floats(row), logits_of(model, list(tokens))) for tokens, row in llm.seen.items()]
        return np.mean([np.linalg.norm(row - truth) / np.linalg.norm(truth) for row, truth in both])

    assert error(with_outliers(model, 100.0)) < 1.5 * error(model)


@pytest.mark.parametrize(("cache", "tolerance"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_smaller_caches_are_near(level, model, cache, tolerance):
    llm = Recorder(model, kv_cache_dtype=cache)
    llm.generate(PROMPTS, GREEDY)
    for tokens, row in llm.seen.items():
        truth = logits_of(model, list(tokens))
        assert np.linalg.norm(floats(row) - truth) < tolerance * np.linalg.norm(truth)


def test_greedy_tokens_are_the_models(model, llm):
    for p, out in zip(PROMPTS, llm.generate(PROMPTS, GREEDY)):
        tokens = list(p)
        for token in out.outputs[0].token_ids:
            assert token == int(logits_of(model, tokens).argmax())
            tokens.append(token)
        assert out.outputs[0].finish_reason == "length"
        assert out.prompt_token_ids == p


def test_a_single_prompt_and_no_prompts(llm):
    assert llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids == llm.generate([PROMPTS[1]], GREEDY)[0].outputs[
        0].token_ids
    assert llm.generate([], GREEDY) == []
    nothing = llm.generate(PROMPTS[1], SamplingParams(max_tokens=0))[0]
    assert nothing.outputs[0].token_ids == []


def test_stream_gives_the_same_tokens(llm):
    expected = llm.generate(PROMPTS, SamplingParams(max_tokens=9, seed=3, n=2))
    found = {}
    for event in llm.stream(PROMPTS, SamplingParams(max_tokens=9, seed=3, n=2)):
        found.setdefault((event.index, event.sample), []).append(event.token_id)
    assert found == {(i, o.index): o.token_ids for i, out in enumerate(expected) for o in out.outputs}


def test_samples_share_the_prompts_pages(llm):
    stream = llm.stream([PROMPTS[3]], SamplingParams(max_tokens=5, n=4, seed=1))
    next(stream)
    used = llm._reservations.pages.num_pages - llm.free_pages
    assert used <= 9 + 4  # 140 tokens are nine pages of 16, and a copy of the last one for each
    stream.close()


def test_generation_ends_at_the_contexts_end(model):
    llm = LLM(model)
    full = prompt(RNG, 300)
    assert len(llm.generate(full, GREEDY)[0].outputs[0].token_ids) == 1
    out = llm.generate(full[:295], GREEDY)[0].outputs[0]
    assert (len(out.token_ids), out.finish_reason) == (6, "length")


@pytest.fixture(scope="module")
def text_llm():
    return LLM(str(SHIPPED))


def test_stop_string(text_llm):
    free = text_llm.generate("ROMEO:", SamplingParams(max_tokens=60, temperature=0))[0].outputs[0]
    stop = free.text[20:24]
    out = text_llm.generate("ROMEO:", SamplingParams(max_tokens=60, temperature=0, stop=[stop]))[0].outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert out.text == free.text[:free.text.index(stop)]
    assert free.token_ids[:len(out.token_ids)] == out.token_ids


def test_stop_id(text_llm):
    free = text_llm.generate("ROMEO:", SamplingParams(max_tokens=30, temperature=0))[0].outputs[0].token_ids
    out = text_llm.generate("ROMEO:", SamplingParams(max_tokens=30, temperature=0, stop_token_ids=[free[10]]))[0]
    assert out.outputs[0].stop_reason == free[10]
    assert out.outputs[0].token_ids == free[:free.index(free[10]) + 1]


@pytest.mark.parametrize("stop", [None, ["t th", "zzz"], ["e"]])
def test_streamed_text_is_the_text(text_llm, stop):
    params = SamplingParams(max_tokens=60, seed=1, stop=stop)
    text = "".join(event.text for event in text_llm.stream("ROMEO:", params))
    assert text == text_llm.generate("ROMEO:", params)[0].outputs[0].text


def test_logits_of_a_prompt(model, llm):
    found = llm.logits(PROMPTS[3])
    for i in (0, 20, 139):
        assert np.allclose(found[i], logits_of(model, PROMPTS[3][:i + 1]), atol=1e-4)


def test_the_directory_and_the_model_have_the_same_bits():
    ids = Tokenizer.from_dir(SHIPPED).encode("JULIET:\nO")
    first, second = Recorder(str(SHIPPED)), Recorder(GPT.from_pretrained(str(SHIPPED)), dtype="float32")
    second.seen = first.seen
    first.generate(ids, GREEDY)
    second.generate(ids, GREEDY)


def test_log_probabilities(model, llm):
    out = llm.generate(PROMPTS[1], SamplingParams(max_tokens=4, seed=1, logprobs=3))[0].outputs[0]
    tokens = list(PROMPTS[1])
    for token, reported in zip(out.token_ids, out.logprobs):
        truth = torch.from_numpy(logits_of(model, tokens)).log_softmax(0)
        assert token in reported
        assert list(reported)[:3] == truth.topk(3).indices.tolist()
        assert all(abs(truth[i] - value) < 1e-4 for i, value in reported.items())
        tokens.append(token)


def test_a_bias_forces_and_forbids(llm):
    free = llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids
    assert set(llm.generate(PROMPTS[1], SamplingParams(max_tokens=5, temperature=0, logit_bias={7: 1e4}))[0].outputs[
        0].token_ids) == {7}
    without = llm.generate(PROMPTS[1], SamplingParams(max_tokens=9, logit_bias={free[0]: -1e4}, seed=1))[0].outputs[0]
    assert free[0] not in without.token_ids


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_large_penalty_never_repeats(llm, penalty):
    out = llm.generate([5], SamplingParams(max_tokens=40, temperature=0, **{penalty: 1e6}))[0].outputs[0].token_ids
    assert len(set(out)) == 40


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda llm: llm.generate([[]], GREEDY), ValueError, r"prompts\[0\] must hold at least one"),
    (lambda llm: llm.generate([[1], [V]], GREEDY), ValueError, rf"prompts\[1\] holds the token id {V}, outside \[0, {V}\)"),
    (lambda llm: llm.generate([[-1]], GREEDY), ValueError, "token id -1"),
    (lambda llm: llm.generate([[0.5]], GREEDY), TypeError, "must hold token ids"),
    (lambda llm: llm.generate([[1] * 301], GREEDY), ValueError, "301 tokens, but the context holds 300"),
    (lambda llm: llm.generate("text", GREEDY), ValueError, "no tokenizer"),
    (lambda llm: llm.generate([[1]], SamplingParams(stop="x")), ValueError, "need a tokenizer"),
    (lambda llm: llm.generate([[1]], [GREEDY, GREEDY]), ValueError, "one for each of the 1 prompts"),
    (lambda llm: llm.generate([[1]], SamplingParams(n=10000)), ValueError, "more kv_cache_tokens"),
    (lambda llm: llm.generate([[1]], {"max_tokens": 3}), TypeError, "params must be a SamplingParams"),
    (lambda llm: llm.generate(5, GREEDY), TypeError, "prompts must be"),
    (lambda llm: llm.generate([[1, [2]]], GREEDY), TypeError, "must hold token ids"),
    (lambda llm: llm.generate([[1], [2]], SamplingParams(seed=[1])), ValueError, "one for each of the 2 prompts"),
    (lambda llm: llm.logits([]), ValueError, "at least one"),
])
def test_bad_requests_are_named_and_the_engine_goes_on(llm, call, error, message):
    with pytest.raises(error, match=message):
        call(llm)
    assert llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"dtype": "float16"}, ValueError, "float32, bfloat16, int8, int4"),
    ({"page_size": 17}, ValueError, "multiple of 16"),
    ({"page_size": 0}, ValueError, "page_size"),
    ({"threads": 0}, ValueError, "threads"),
    ({"kv_cache_dtype": "fp8"}, ValueError, "float32, bfloat16, int8"),
    ({"kv_cache_tokens": 0}, ValueError, "kv_cache_tokens"),
    ({"kv_cache_tokens": 10 ** 11}, ValueError, "kv_cache_tokens"),
])
def test_bad_settings_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        LLM(model, **options)


def test_bad_models_are_named(tmp_path):
    with pytest.raises(TypeError, match="path or a fastgpt.GPT"):
        LLM(7)
    with pytest.raises(FileNotFoundError):
        LLM(tmp_path / "none")


def test_more_requests_than_the_cache_holds_take_turns(model):
    llm = LLM(model, page_size=16, kv_cache_tokens=64)
    many = [prompt(RNG, 20) for _ in range(9)]
    params = SamplingParams(max_tokens=20, temperature=0)
    together = [out.outputs[0].token_ids for out in llm.generate(many, params)]
    assert together == [llm.generate(p, params)[0].outputs[0].token_ids for p in many]
    assert llm.free_pages == 4


def test_a_cache_full_of_another_callers_tokens_is_an_error(model):
    llm = LLM(model, page_size=16, kv_cache_tokens=48)
    first = llm.stream([[1] * 30], SamplingParams(max_tokens=10, temperature=0))
    next(first)
    with pytest.raises(OutOfPages, match="promised to others"):
        llm.generate([[2] * 20], GREEDY)
    assert len(list(first)) == 9
    assert llm.generate([[2] * 20], GREEDY)[0].outputs[0].token_ids


def test_an_interrupt_between_tokens_frees_everything(llm):
    for event in llm.stream(PROMPTS, GREEDY):
        break
    gc.collect()
    assert llm.free_pages == llm._reservations.pages.num_pages

    class Interrupt(LLM):
        def choose(self, ready, logits):
            raise KeyboardInterrupt

    broken = Interrupt(small_model())
    with pytest.raises(KeyboardInterrupt):
        broken.generate(PROMPTS, GREEDY)
    assert broken.free_pages == broken._reservations.pages.num_pages
    assert broken._reservations.promised == 0


def test_two_threads_share_an_engine(llm):
    expected = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]
    found = {}

    def work(name):
        found[name] = [[o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)] for _ in range(5)]

    workers = [threading.Thread(target=work, args=(name,)) for name in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(tokens == expected for runs in found.values() for tokens in runs)


def test_threads_wait_for_each_others_pages(model):
    llm = LLM(model, page_size=16, kv_cache_tokens=64)
    many, params, found = [prompt(RNG, 20) for _ in range(9)], SamplingParams(max_tokens=20, temperature=0), []
    workers = [threading.Thread(target=lambda: found.append(llm.generate(many, params))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert llm.free_pages == 4


def test_a_stream_that_the_garbage_collector_ends(model):
    """In a cycle, so that it is collected at some allocation, perhaps in the middle of another step."""
    llm = LLM(model, page_size=16)
    for _ in range(30):
        cycle = [llm.stream(PROMPTS, GREEDY)]
        cycle.append(cycle)
        next(cycle[0])
        del cycle
        llm.generate(PROMPTS[:2], GREEDY)
    gc.collect()
    llm.generate([1], GREEDY)
    assert llm.free_pages == llm._reservations.pages.num_pages
    assert llm._reservations.promised == 0
    assert not llm._active


def test_the_last_token_needs_no_page(model):
    llm = LLM(model, page_size=16, kv_cache_tokens=16)
    assert len(llm.generate([1], SamplingParams(max_tokens=16, temperature=0))[0].outputs[0].token_ids) == 16
    with pytest.raises(ValueError, match="2 pages"):
        llm.generate([1], SamplingParams(max_tokens=17))


def test_threads_are_this_engines_own(model):
    before = _C.threads()
    LLM(model, threads=3).generate([1], GREEDY)
    assert _C.threads() == before


def test_a_model_that_changes_later_changes_nothing():
    model = small_model()
    llm = LLM(model)
    expected = llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids
    model.config.block_size = 10 ** 6
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert llm.generate([1, 2], GREEDY)[0].outputs[0].token_ids == expected
    with pytest.raises(ValueError, match="the context holds 300"):
        llm.generate([[1] * 400], GREEDY)


def test_a_model_unlike_its_config_is_refused():
    model = small_model()
    model.lm_head.weight = model.transformer.wte.weight = torch.nn.Parameter(torch.randn(V + 10, 35))
    with pytest.raises(ValueError, match="wte.*its config says"):
        LLM(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("where", ["lm_head", "transformer.h.1.mlp.c_fc", "transformer.h.0.attn.c_attn"])
def test_a_nan_anywhere_is_seen(dtype, where):
    model = small_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_submodule(where).weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        LLM(model, dtype, kv_cache_dtype="int8").generate([1, 2, 3], GREEDY)


def test_logits_that_are_no_distribution_are_refused():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    llm = LLM(model)
    with pytest.raises(ValueError, match="not finite"):
        llm.generate([1, 2], GREEDY)
    assert llm.free_pages == llm._reservations.pages.num_pages


def test_thousands_of_requests_leave_nothing_behind(llm):
    rng = np.random.default_rng(2)
    for _ in range(60):
        prompts = [prompt(rng, int(rng.integers(1, 30))) for _ in range(20)]
        params = [SamplingParams(max_tokens=int(rng.integers(0, 4)), n=int(rng.integers(1, 3)), seed=1) for _ in prompts]
        if rng.random() < 0.2:
            for event, _ in zip(llm.stream(prompts, params), range(7)):
                pass
        else:
            llm.generate(prompts, params)
    assert llm.free_pages == llm._reservations.pages.num_pages
