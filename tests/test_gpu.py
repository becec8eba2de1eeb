"""The model and the engine on a GPU: pytest -m gpu. The ops' own tests run there too, as do tests/gpusim/test_cuda_*.py and
test_gpu_benchmarks.py."""
import dataclasses
import threading

import numpy as np
import pytest
import torch
from engines import prompt, small_model

from fastgpt import GPT, LLM, GPTConfig, SamplingParams, ops
from fastgpt.cuda.launch import run
from fastgpt.engine import in_model
from fastgpt.extension import _C

pytestmark = pytest.mark.gpu
CONFIG = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=64, dropout=0.1, bias=True)
GREEDY = SamplingParams(max_tokens=20, temperature=0)
DRAWN = SamplingParams(max_tokens=12, seed=4, n=3, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
PENALISED = SamplingParams(max_tokens=12, seed=5, temperature=1.2, repetition_penalty=1.3, frequency_penalty=0.4,
                           presence_penalty=0.2, logit_bias={3: 2.0, 5: -1.0})
TOLD = SamplingParams(max_tokens=15, temperature=0, logprobs=4)
needs_engine = pytest.mark.skipif(_C is None, reason="needs the extension")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


def make(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **changes})).cuda()


def train(model, dtype, steps=5):
    """Losses by AdamW on one batch, under autocast, with a gradient scaler for float16."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    idx, losses = torch.randint(65, (4, 65), device="cuda"), []
    for _ in range(steps):
        with torch.autocast("cuda", dtype):
            loss = model(idx[:, :-1], idx[:, 1:].contiguous(), return_logits=False)[1]
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training(dtype, checkpointing):
    model = make()
    model.config.gradient_checkpointing = checkpointing
    assert ops.resolve("attention", device="cuda")[0] == "triton"
    losses = train(model, dtype)
    assert losses[-1] < losses[0]


def test_training_compiled():
    losses = train(torch.compile(make(dropout=0.0)), torch.bfloat16)
    assert losses[-1] < losses[0]


def test_generation_is_that_of_the_reference():
    model = make(dropout=0.0).eval()
    idx = torch.randint(65, (2, 7), device="cuda")
    ours = model.generate(idx, 20, temperature=0)
    with ops.backend("reference"):
        assert torch.equal(ours, model.generate(idx, 20, temperature=0))


@two_gpus
def test_a_second_device():
    x, weight = torch.randn(5, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    assert ops.layer_norm(x, weight).device == x.device


# ---- the engine

@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(autouse=True)
def waits_as_ever():
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(model, dtype="float32", device="cuda", **options):
    return LLM(model, dtype, device=device, **{"kv_cache_tokens": 4000, "warm_up": 0, **options})


def prompts(seed=0, lengths=(3, 40, 1, 17, 130)):
    rng = np.random.default_rng(seed)
    return [prompt(rng, length) for length in lengths]


def ids(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@needs_engine
@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 11}, {"kv_cache_tokens": 400, "page_size": 7}], ids=str)
def test_tokens_are_those_of_the_cpu(model, options):
    """Greedy and drawn ones, samples that part, prompts whole and cut, requests that wait."""
    params = [GREEDY, DRAWN, PENALISED, GREEDY, DRAWN]
    expected = ids(LLM(model).generate(prompts(), params))
    llm = on_gpu(model, **options)
    for _ in range(2):  # with graphs that are made, and that are there
        assert ids(llm.generate(prompts(), params)) == expected
    assert llm.free_pages == llm._reservations.pages.num_pages


@needs_engine
def test_many_sequences(model):
    """More than the largest graph has room for, and what is left of them."""
    many = prompts(1, [1 + i % 9 for i in range(300)])
    params = [SamplingParams(max_tokens=2 + i % 7, temperature=0) for i in range(300)]
    assert ids(on_gpu(model, kv_cache_tokens=20000).generate(many, params)) == ids(LLM(model).generate(many, params))


@needs_engine
def test_the_default_device_is_not_asked(model):
    expected = ids(LLM(model).generate(prompts(), PENALISED))
    with torch.device("cuda"):
        assert ids(on_gpu(model).generate(prompts(), PENALISED)) == expected


def as_packed(llm, model):
    """The model with the numbers that weights of few bits stand for: head and embedding are two, as they may be there."""
    twin = GPT(dataclasses.replace(model.config, tie_word_embeddings=False))
    twin.load_state_dict(model.state_dict())
    w = llm._weights
    pairs = [(w.head, twin.lm_head)]
    for ours, block in zip(w.layers, twin.transformer.h):
        pairs += zip((ours[name] for name in ("qkv", "proj", "fc", "out")),
                     (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj))
    with torch.no_grad():
        for ours, linear in pairs:
            if hasattr(ours, "packed"):
                linear.weight.copy_(ours.packed.dequantised(torch.float32))
    return twin.eval()


def logits_of(model, tokens, dtype):
    """By PyTorch's ops in dtype on the CPU."""
    tokens = torch.tensor([tokens])
    with torch.no_grad(), ops.backend("reference"):
        return model.to(dtype)(tokens, tokens)[0][0].double().numpy()


# In the last place of a cache's numbers.
UNITS = {"float32": 2.0 ** -23, "bfloat16": 2.0 ** -7, "float16": 2.0 ** -10, "int8": 1 / 127, "float8": 2.0 ** -3}


@needs_engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("cache", UNITS)
def test_every_dtype(model, dtype, cache):
    """Logits as near to the truth as PyTorch's, by factor 2, and by what the cache's numbers are off."""
    text, llm = prompts(4, (130,))[0], on_gpu(model, dtype, kv_cache_dtype=cache)
    twin, compute = as_packed(llm, model), llm._weights.compute
    truth = logits_of(twin, text, torch.float64)
    ours, theirs = (np.linalg.norm(found - truth) / np.linalg.norm(truth)
                    for found in (llm.logits(text), logits_of(twin, text, compute)))
    assert ours <= 2 * theirs + UNITS[cache]
    params = SamplingParams(max_tokens=6, temperature=0, logprobs=2)
    assert [len(out.outputs[0].token_ids) for out in llm.generate(prompts(), params)] == [6] * 5


@needs_engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_a_replayed_graph_has_the_bits_of_its_calls(model, dtype):
    llm = on_gpu(model, dtype)
    llm.generate(prompts(), GREEDY)
    runner = llm.runner
    assert len(runner._graphs) >= 1
    with torch.inference_mode():
        for size, (static, logits, replay) in runner._graphs.items():
            logits.fill_(float("nan"))
            replay()
            batch = runner._views(static, size, size, runner._table_width, model.config.block_size)
            assert torch.equal(logits, runner._forward(batch)) and logits.isfinite().all()


@needs_engine
def test_a_step_waits_for_nothing(model, monkeypatch):
    """Neither of prompts nor of tokens, and neither their draws and log probabilities; the second time, when kernels and graphs
    are there."""
    params, calls = [GREEDY, DRAWN, PENALISED, TOLD, DRAWN], []
    llm = on_gpu(model)
    llm.generate(prompts(), params)

    def watched(name, function):
        def call(*arguments, **options):
            calls.append(name)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return call
    names = {"step", "draws", "next_draws", "draw", "log_probabilities", "report", "copy_pages"}
    for name in names:
        monkeypatch.setattr(llm.runner, name, watched(name, getattr(llm.runner, name)))
    llm.generate(prompts(), params)
    assert set(calls) == names


@needs_engine
def test_a_warm_engine_makes_no_graphs(model):
    llm = on_gpu(model, warm_up=9)
    assert sorted(llm.runner._graphs) == [1, 2, 4, 8, 16] and llm.free_pages == llm._reservations.pages.num_pages
    assert ids(llm.generate(prompts(), GREEDY)) == ids(LLM(model).generate(prompts(), GREEDY))
    assert len(llm.runner._graphs) == 5


@needs_engine
def test_log_probabilities(model):
    ours, theirs = (llm.generate(prompts(), TOLD) for llm in (on_gpu(model), LLM(model)))
    for a, b in zip(ours, theirs):
        for x, y in zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True):
            assert x.keys() == y.keys()
            np.testing.assert_allclose(list(x.values()), list(y.values()), atol=2e-5)


@needs_engine
def test_a_model_draws_by_pytorchs_generator():
    own, text = make(dropout=0.0).eval(), torch.randint(65, (2, 7), device="cuda")
    def drawn(seed):
        torch.manual_seed(seed)
        return own.generate(text, 20)
    assert torch.equal(drawn(5), drawn(5)) and not torch.equal(drawn(5), drawn(6))


@needs_engine
def test_a_model_that_leaves_the_gpu_leaves_nothing_there():
    own, text = make(dropout=0.0).eval(), torch.randint(65, (2, 7), device="cuda")
    own.generate(text, 20)
    own.cpu()
    assert own not in in_model._engines


@needs_engine
def test_engines_in_several_threads(model):
    """Two on one engine and one on another, all of which make graphs."""
    shared, found = on_gpu(model), {}
    work = {0: shared, 1: shared, 2: on_gpu(model, page_size=16)}

    def generate(seed):
        found[seed] = ids(work[seed].generate(prompts(seed), GREEDY))
    threads = [threading.Thread(target=generate, args=(seed,)) for seed in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in work:
        assert found.get(seed) == ids(LLM(model).generate(prompts(seed), GREEDY)), seed


@needs_engine
def test_a_stream_that_is_left_early(model):
    llm = on_gpu(model)
    for number, _ in enumerate(llm.stream(prompts(), GREEDY)):
        if number == 7:
            break
    assert ids(llm.generate(prompts(), GREEDY)) == ids(LLM(model).generate(prompts(), GREEDY))
    assert llm.free_pages == llm._reservations.pages.num_pages


@needs_engine
def test_a_broken_model_is_told(model):
    broken = small_model()
    with torch.no_grad():
        broken.transformer.ln_f.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        on_gpu(broken).generate(prompts(), GREEDY)


@needs_engine
def test_memory_that_is_not_there_is_named():
    with pytest.raises(MemoryError, match="kv_cache_tokens: there is no memory for a cache of 134217728 tokens"):
        on_gpu(GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=4, n_embd=1024)), kv_cache_tokens=2 ** 27)
    assert torch.ones(2, device="cuda").sum() == 2


@needs_engine
def test_a_launch_that_the_gpu_refuses_is_named():
    """And the next one is none of its business."""
    page, pairs = torch.zeros(16, dtype=torch.uint8, device="cuda"), torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match=r"copy_pages\(tensors=70000, copies=1, page_bytes=16\): invalid"):
        run("copy_pages", page.device, page.data_ptr(), 70000, 0, 16, pairs.data_ptr(), 1)
    run("copy_pages", page.device, page.data_ptr(), 1, 0, 16, pairs.data_ptr(), 1)
    torch.cuda.synchronize()


@needs_engine
@two_gpus
def test_an_engine_on_a_second_device(model):
    expected = ids(LLM(model).generate(prompts(), DRAWN))
    llm = on_gpu(model, device="cuda:1")
    assert torch.cuda.current_device() == 0 and llm.runner._pages.device == torch.device("cuda:1")
    assert ids(llm.generate(prompts(), DRAWN)) == expected
