"""The bits of a token's logits depend on nothing but the tokens before it: not on the batch, the pieces of the prompt, the
pages, the threads, shared prefixes or the run."""
import random

import numpy as np
import pytest

from engines import V, Recorder, prompt, small_model
from fastgpt import SamplingParams

DTYPES = ("float32", "bfloat16", "int8", "int4")
CASES = 60  # random compositions of each dtype and level
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return small_model()


def shuffled_pages(llm, rng):
    rng.shuffle(llm._reservations.pages._free)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_have_the_same_bits_in_every_composition(model, level, dtype):
    rng, numbers = random.Random(5), np.random.default_rng(5)
    prompts = [prompt(numbers, length) for length in (1, 2, 7, 33, 64, 129, 200)]
    # Prompts that share a prefix, up to the middle of a page.
    prompts += [prompts[-1][:90] + prompt(numbers, 5) for _ in range(2)]
    seen = None
    for case in range(CASES):
        llm = Recorder(model, dtype, threads=rng.choice((1, 2, 3)), page_size=rng.choice((16, 32, 48, 64, 256)),
                       max_step_tokens=rng.choice((1, 7, 64, 512)))
        seen = llm.seen = seen if seen is not None else {}
        shuffled_pages(llm, rng)
        chosen = [rng.choice(prompts) for _ in range(rng.choice((1, 1, 2, 3, 6)))]
        params = [SamplingParams(max_tokens=rng.randint(1, 12), n=rng.choice((1, 1, 2)), **GREEDY) for _ in chosen]
        llm.generate(chosen, params)
        llm._reservations.pages.check()
        assert llm.free_pages == llm._reservations.pages.num_pages
    assert len(seen) > 60


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
def test_a_cache_of_any_dtype_keeps_the_bits(model, level, cache):
    numbers = np.random.default_rng(7)
    prompts = [prompt(numbers, length) for length in (3, 70, 150)]
    seen = {}
    for page_size, step in ((16, 512), (64, 7), (256, 33)):
        llm = Recorder(model, "float32", page_size=page_size, max_step_tokens=step, kv_cache_dtype=cache)
        llm.seen = seen
        for group in (prompts, prompts[::-1], prompts[1:2]):
            llm.generate(group, SamplingParams(max_tokens=9, **GREEDY))
    assert len(seen) == 27


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_replays_alone(model, dtype):
    """Sampled tokens, in a batch of others and alone."""
    numbers = np.random.default_rng(11)
    prompts = [prompt(numbers, length) for length in (5, 40, 17)]
    params = [SamplingParams(max_tokens=20, temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.1, n=2, seed=s)
              for s in (1, 2, 3)]
    llm = Recorder(model, dtype, page_size=16, max_step_tokens=16)
    together = llm.generate(prompts, params)
    for own, p, out in zip(prompts, params, together):
        alone = llm.generate([own], p)[0]
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in out.outputs]
    assert together[0].outputs[0].token_ids != together[0].outputs[1].token_ids
    assert all(0 <= token < V for out in together for o in out.outputs for token in o.token_ids)
