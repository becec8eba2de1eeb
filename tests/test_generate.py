"""Generation: the cache against recomputation, ragged batches against single prompts, each way to choose a token."""
import pytest
import torch

from fastgpt import GPT, GPTConfig, SamplingParams, generation, sampling, torch_sampling
from fastgpt.engine import in_model
from fastgpt.generation import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK, V = 16, 50
RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], list(range(20, 33))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=3, n_embd=24, initializer_range=0.4)).eval()


@pytest.fixture(autouse=True, params=["engine", "ops"])
def path(request, monkeypatch):
    """Every test twice: on the decode engine, and on the model's own ops, which other devices use."""
    if request.param == "ops":
        monkeypatch.setattr(in_model, "why_not", lambda *_: "a test of the ops")


class Letters:
    """A tokenizer: id i is the i-th of these characters, and the last id is nothing but the end."""

    alphabet = "".join(chr(ord("A") + i) for i in range(V - 1))
    eos_token_id = V - 1

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids if i != self.eos_token_id)


def recompute(model, idx, n, choose):
    """nanoGPT's loop: the whole context through the model for each token, cropped to the last block_size."""
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1]
        idx = torch.cat((idx, choose(logits)), dim=1)
    return idx


def greedily(logits):
    return logits.argmax(-1, keepdim=True)


@pytest.mark.parametrize(("length", "n"), [(1, 1), (5, 8), (5, 30), (BLOCK, 5), (BLOCK + 9, 7), (1, BLOCK), (3, 0)])
def test_greedy_tokens_equal_full_recomputation(model, length, n):
    idx = torch.randint(V, (3, length))
    out = model.generate(idx, n, temperature=0)
    assert out.dtype == torch.int64 and torch.equal(out, recompute(model, idx, n, greedily))


@pytest.mark.parametrize("switches", [
    {"bias": False}, {"scale_attn_by_inverse_layer_idx": True},
    {"n_head": 1, "tie_word_embeddings": False, "activation": "relu"}])
def test_greedy_tokens_equal_full_recomputation_for_other_models(switches):
    config = {"block_size": 32, "vocab_size": V, "n_layer": 3, "n_head": 4, "n_embd": 20, "initializer_range": 0.4}
    model = GPT(GPTConfig(**{**config, **switches})).eval()
    idx = torch.randint(V, (2, 6))
    assert torch.equal(model.generate(idx, 30, 0.0), recompute(model, idx, 30, greedily))


def test_without_a_seed_the_tokens_are_nanogpts(model):
    def draw(logits):
        logits = logits / 0.8
        least = torch.topk(logits, 20).values[:, -1:]
        return torch.multinomial(logits.masked_fill(logits < least, -torch.inf).softmax(-1), 1)

    idx = torch.randint(V, (4, 3))
    torch.manual_seed(7)
    expected = recompute(model, idx, 25, draw)
    torch.manual_seed(7)
    assert torch.equal(model.generate(idx, 25, temperature=0.8, top_k=20), expected)


@pytest.mark.parametrize("n", [3, 30])
def test_ragged_prompts_give_what_each_gives_alone(model, n):
    together = model.generate(RAGGED, n, temperature=0)
    assert together == [recompute(model, torch.tensor([prompt]), n, greedily)[0].tolist() for prompt in RAGGED]


def test_padding_of_a_ragged_batch_is_not_seen(model):
    """A prompt's logits do not move with what lies beside it, up to rounding: sampled tokens agree for many seeds."""
    long = [[int(i) for i in torch.randint(V, (15,))]]
    for seed in range(4):
        assert model.generate([[7], *long], 20, seed=seed)[0] == model.generate([[7]], 20, seed=seed)[0]


def test_a_seeded_request_replays_alone(model):
    seeds = [11, 12, 13, 14]
    together = model.generate(RAGGED, 24, seed=seeds, n=3, top_p=0.95)
    assert len(together) == 12
    for p, (prompt, seed) in enumerate(zip(RAGGED, seeds)):
        torch.manual_seed(p)  # torch's generator has no say
        assert model.generate([prompt], 24, seed=seed, n=3, top_p=0.95) == together[3 * p:3 * p + 3]
    backwards = model.generate(RAGGED[::-1], 24, seed=seeds[::-1], n=3, top_p=0.95)
    assert backwards == [row for p in (3, 2, 1, 0) for row in together[3 * p:3 * p + 3]]
    assert len(set(map(tuple, together[:3]))) == 3  # the samples of one prompt differ


def test_one_seed_is_every_requests_seed(model):
    first, second = model.generate([[1, 2], [1, 2]], 10, seed=5)
    assert first == second != model.generate([[1, 2]], 10, seed=6)[0]


def test_n_samples_of_a_tensor_are_neighbours(model):
    idx = torch.randint(V, (2, 4))
    out = model.generate(idx, 6, n=3, seed=1)
    assert out.shape == (6, 10) and torch.equal(out[:, :4], idx.repeat_interleave(3, dim=0))


def test_sampling_params_are_taken_whole(model):
    params = SamplingParams(max_tokens=9, temperature=0.7, top_k=10, seed=3)
    assert model.generate(RAGGED, params=params) == model.generate(RAGGED, 9, 0.7, 10, seed=3)
    for argument in ({"max_new_tokens": 9}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="either params or its fields"):
            model.generate(RAGGED, params=params, **argument)
    assert model.generate(RAGGED, max_tokens=9, temperature=0.7, top_k=10, seed=3) == model.generate(RAGGED, params=params)
    for arguments in ({}, {"max_new_tokens": 3, "max_tokens": 3}):
        with pytest.raises(TypeError, match="give max_new_tokens"):
            model.generate(RAGGED, **arguments)
    with pytest.raises(TypeError, match="generate: no argument 'topp'; the sampling arguments are max_tokens, temp"):
        model.generate(RAGGED, 9, topp=0.5)


def test_int32_prompts_and_lists_of_tensors(model):
    prompt = torch.tensor([[3, 1, 4]], dtype=torch.int32)
    expected = model.generate(prompt.long(), 5, 0)
    assert torch.equal(model.generate(prompt, 5, 0), expected)
    assert model.generate([prompt[0]], 5, 0) == expected.tolist()


def test_bfloat16_and_autocast_generate(model):
    half = GPT(model.config).to(torch.bfloat16).eval()
    assert half.generate(torch.zeros(2, 3, dtype=torch.int64), 20, top_k=5).shape == (2, 23)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate(RAGGED, 10, seed=0)[0]) == 13


# The choice of one token, from logits that are written down


def kept(logits, **params):
    """Which tokens have a chance, and what it is after normalising."""
    probs = torch_sampling.distribution(torch.tensor([logits]), SamplingParams(**params))[0]
    return {i: round(float(p / probs.sum()), 4) for i, p in enumerate(probs) if p > 0}


LOGITS = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().tolist()


@pytest.mark.parametrize(("params", "expected"), [
    ({}, {0: 0.1, 1: 0.4, 2: 0.3, 3: 0.2}),
    ({"temperature": 0.5}, {0: 0.0333, 1: 0.5333, 2: 0.3, 3: 0.1333}),
    ({"top_k": 2}, {1: 0.5714, 2: 0.4286}),
    ({"top_k": 1}, {1: 1.0}),
    ({"top_k": 99}, {0: 0.1, 1: 0.4, 2: 0.3, 3: 0.2}),
    ({"top_k": -1}, {0: 0.1, 1: 0.4, 2: 0.3, 3: 0.2}),
    ({"top_p": 0.39}, {1: 1.0}),
    ({"top_p": 0.41}, {1: 0.5714, 2: 0.4286}),
    ({"top_p": 1e-9}, {1: 1.0}),
    ({"top_p": 0.65, "top_k": 3}, {1: 0.5714, 2: 0.4286}),
    ({"min_p": 0.49}, {1: 0.4444, 2: 0.3333, 3: 0.2222}),
    ({"min_p": 0.51}, {1: 0.5714, 2: 0.4286}),
    ({"min_p": 1.0}, {1: 1.0}),
])
def test_filters_keep_the_right_tokens(params, expected):
    assert kept(LOGITS, **params) == expected


def test_top_k_keeps_ties_and_top_p_the_first_of_them():
    assert kept([1.0, 2.0, 2.0, 2.0], top_k=2).keys() == {1, 2, 3}
    assert kept([2.0, 2.0, 2.0, 2.0], top_p=0.5).keys() == {0, 1}


def test_filters_equal_transformers():
    pytest.importorskip("transformers")
    from transformers.generation import logits_process as hf
    logits = torch.randn(8, 100, dtype=torch.float64) * 3
    for temperature, k, p, min_p in [(0.7, 100, 1.0, 0.0), (1.3, 20, 1.0, 0.0), (1.0, 100, 0.8, 0.0),
                                     (2.0, 50, 0.9, 0.05)]:
        warpers = [hf.TemperatureLogitsWarper(temperature), hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p)]
        expected = hf.LogitsProcessorList([*warpers, hf.MinPLogitsWarper(min_p)])(None, logits).softmax(-1)
        probs = torch_sampling.distribution(logits, SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=min_p))
        torch.testing.assert_close(probs / probs.sum(-1, keepdim=True), expected)


def test_repetition_penalty_equals_transformers():
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits, held = torch.randn(200, 20) - 2, torch.randint(20, (200, 6))  # the largest of a row has either sign
    counts = torch.zeros(200, 20, dtype=torch.int32).scatter(1, held, -1)
    for penalty in (0.6, 1.7):
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(held, logits).argmax(-1)
        params = SamplingParams(temperature=0, repetition_penalty=penalty)
        assert torch.equal(torch_sampling.choose(logits, params, counts), expected)


def test_a_large_repetition_penalty_never_repeats(model):
    for row in model.generate(RAGGED, 20, temperature=0, repetition_penalty=1e6, n=2):
        assert len(set(row)) == len(row)


def test_a_repetition_penalty_counts_prompt_and_new_tokens_but_no_padding():
    """A model whose logits are 100 - id, whatever it reads: a penalty that forbids what is held gives ids in order."""
    config = GPTConfig(BLOCK, V, n_layer=1, n_head=1, n_embd=2, tie_word_embeddings=False)
    model = GPT(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
        model.lm_head.weight[:, 0] = 100 - torch.arange(V)
    rows = model.generate([[9, 30], [12, 1, 14, 3]], 5, temperature=0, repetition_penalty=1e4)
    assert rows == [[9, 30, 0, 1, 2, 3, 4], [12, 1, 14, 3, 0, 2, 4, 5, 6]]


def test_seeded_draws_follow_the_distribution():
    n = 20_000
    draws = torch.tensor([sampling.uniform(seed, 0, 5) for seed in range(n)], dtype=torch.float64)
    ids = torch_sampling.choose(torch.tensor([LOGITS]).expand(n, -1), SamplingParams(), uniforms=draws)
    frequency = torch.bincount(ids, minlength=4) / n
    # five standard deviations of a frequency of n draws
    torch.testing.assert_close(frequency, torch.tensor([0.1, 0.4, 0.3, 0.2]), rtol=0, atol=5 * 0.5 / n ** 0.5)


def test_a_draw_never_takes_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.5 - 2 ** -52, 0.5, 1 - 2 ** -52], dtype=torch.float64)
    assert torch_sampling.choose(logits, SamplingParams(), uniforms=uniforms).tolist() == [1, 1, 3, 3]


def test_uniform_is_even_and_depends_on_every_word():
    values = torch.tensor([sampling.uniform(s, j, p) for p in range(50) for s in range(10) for j in range(4)])
    assert len(set(values.tolist())) == len(values)
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert counts.min() > 150 and counts.max() < 250  # 200 expected, standard deviation 13
    assert 0 <= sampling.uniform(2 ** 63 - 1, 10 ** 6, 10 ** 6) < 1
    # fixed for ever: a seed must give the same text in every version
    assert [sampling.uniform(0, 0, 0), sampling.uniform(1, 2, 3)] == [0.13870941014555416, 0.814259011529328]


@pytest.mark.parametrize("logits", [[float("nan"), 0.0], [float("inf"), 0.0], [-torch.inf, -torch.inf]])
def test_logits_that_are_no_distribution_are_refused(logits):
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are not finite"):
            torch_sampling.choose(torch.tensor([logits]), SamplingParams(temperature=temperature))


# Where a sequence ends


def test_stop_ids_end_each_row_where_it_first_meets_one(model):
    free = model.generate(RAGGED, 12, seed=4)
    stop = [free[0][5], free[2][9]]
    for row, whole, prompt in zip(model.generate(RAGGED, 12, seed=4, stop_token_ids=stop), free, RAGGED):
        new = whole[len(prompt):]
        end = min((new.index(i) + 1 for i in stop if i in new), default=12)
        assert row == whole[:len(prompt) + end]


def test_a_tensors_rows_that_end_early_are_filled_up(model):
    idx = torch.tensor([[1, 2], [3, 4]])
    free = model.generate(idx, 12, seed=[4, 5])
    stop = next(int(i) for i in free[0, 2:] if i not in free[1])
    out = model.generate(idx, 12, seed=[4, 5], stop_token_ids=[stop])
    end = free[0].tolist().index(stop)
    assert torch.equal(out[1], free[1]) and torch.equal(out[0, :end], free[0, :end])
    assert out[0, end:].eq(stop).all()
    both = model.generate(idx[:1], 12, seed=4, stop_token_ids=[stop])
    assert torch.equal(both, free[:1, :end + 1])  # no longer than the longest row


def test_the_tokenizers_end_token_ends_a_row_unless_ignored(model):
    tokenizer = Letters()
    free = model.generate([[1, 2]], 14, seed=8)[0]
    tokenizer.eos_token_id = free[6]
    end = free[2:].index(free[6]) + 3
    assert model.generate([[1, 2]], 14, seed=8, tokenizer=tokenizer)[0] == free[:end]
    assert model.generate([[1, 2]], 14, seed=8, tokenizer=tokenizer, ignore_eos=True)[0] == free


@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_end_a_row_once_its_new_text_holds_one(model, length):
    tokenizer = Letters()
    free = model.generate([[1, 2]], 14, seed=8)[0]
    stop = tokenizer.decode(free[4:4 + length])
    out = model.generate([[1, 2]], 14, seed=8, tokenizer=tokenizer, stop=["\N{SNOWMAN}", stop], ignore_eos=True)[0]
    end = tokenizer.decode(free[2:]).index(stop) + 2 + length
    assert out == free[:end]


def test_a_stop_string_in_the_prompt_does_not_count(model):
    tokenizer = Letters()
    out = model.generate([[1, 2]], 5, seed=8, tokenizer=tokenizer, stop=tokenizer.decode([1, 2]), ignore_eos=True)
    assert len(out[0]) == 7


def test_stop_strings_may_span_tokens_of_many_bytes(model):
    class Syllables:
        def decode(self, ids):
            return "".join(("né", "\N{SNOWMAN}\N{SNOWMAN}", "ab")[i % 3] for i in ids)

    tokenizer = Syllables()
    free = model.generate([[1]], 15, seed=2)[0]
    text = tokenizer.decode(free[1:])
    stop = text[5:9]
    out = model.generate([[1]], 15, seed=2, tokenizer=tokenizer, stop=stop)[0]
    assert stop in tokenizer.decode(out[1:]) and stop not in tokenizer.decode(out[1:-1])


def test_the_streamer_gets_every_new_token_in_order(model):
    got = {}
    out = model.generate(RAGGED, 10, seed=4, n=2, stop_token_ids=[3, 5, 7, 9],
                         streamer=lambda row, token: got.setdefault(row, []).append(token))
    assert [got[r] for r in range(8)] == [row[len(RAGGED[r // 2]):] for r, row in enumerate(out)]


def test_an_error_in_the_streamer_reaches_the_caller_and_the_model_stays_usable(model):
    def interrupt(row, token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(RAGGED, 10, streamer=interrupt)
    assert model.generate(RAGGED, 3, 0) == model.generate(RAGGED, 3, 0)


# The cache


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [7, 1, 8], [3, 13]])
def test_a_prompt_read_in_chunks_gives_the_same_states(model, chunks):
    idx = torch.randint(V, (2, BLOCK))
    cache = KVCache(BLOCK)
    with torch.no_grad():
        parts = [model.hidden_states(part, cache=cache) for part in idx.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden_states(idx), rtol=1e-4, atol=1e-5)
    assert cache.length == BLOCK


def test_the_cache_is_allocated_once_and_refuses_more_than_it_holds():
    cache = KVCache(5)
    k, v = torch.randn(2, 1, 3, 4, 8)
    cache.append(0, k, v)
    storage = cache.layers[0][0].data_ptr()
    cache.length = 4
    keys, values = cache.append(0, k[:, :, :1], v[:, :, :1])
    assert keys.shape == values.shape == (1, 3, 5, 8) and cache.layers[0][0].data_ptr() == storage
    assert torch.equal(keys[:, :, :4], k) and torch.equal(values[:, :, 4:], v[:, :, :1])
    with pytest.raises(ValueError, match="6 positions do not fit into its capacity of 5"):
        cache.append(0, k[:, :, :2], v[:, :, :2])


def test_one_forward_reads_only_the_new_token(model):
    lengths = []
    hook = model.transformer.wte.register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[:2]))
    model.generate(torch.zeros(2, 5, dtype=torch.int64), 6, n=2)
    hook.remove()
    assert lengths == [(2, 5)] + [(4, 1)] * 5


# Bad input


@pytest.mark.parametrize(("idx", "error", "message"), [
    (torch.zeros(3, dtype=torch.int64), ValueError, r"idx must have shape \(B, T\)"),
    (torch.zeros(1, 3), TypeError, r"idx\[0\] must hold token ids as int64 or int32, got torch.float32"),
    (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"idx\[0\] is empty"),
    ([[1], []], ValueError, r"idx\[1\] is empty: a prompt needs at least one token"),
    ([[1], [2, V]], ValueError, rf"idx\[1\] holds the token id {V}, outside \[0, {V}\)"),
    ([[1], [-1, 2]], ValueError, r"idx\[1\] holds the token id -1"),
    ([1, 2, 3], ValueError, r"idx\[0\] must be a sequence of token ids, got 1"),
    (["text"], TypeError, r"idx\[0\] must be a sequence of token ids, got 'text'"),
    ([[1.5]], TypeError, r"idx\[0\] must hold token ids as int64"),
    ([[True]], TypeError, r"idx\[0\] must hold token ids as int64"),
    (7, TypeError, "idx must be"),
])
def test_bad_prompts_are_named(model, idx, error, message):
    with pytest.raises(error, match=message):
        model.generate(idx, 3)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
    ({"max_tokens": -1}, ValueError, "max_tokens must be at least 0, got -1"),
    ({"max_new_tokens": 3, "temperature": -1.0}, ValueError, "temperature must be from 0 to 1e"),
    ({"max_new_tokens": 3, "temperature": float("nan")}, ValueError, "temperature must be from 0"),
    ({"max_new_tokens": 3, "temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"max_new_tokens": 3, "top_k": -2}, ValueError, "top_k must be at least 1, got -2"),
    ({"max_new_tokens": 3, "top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
    ({"max_new_tokens": 3, "min_p": 1.1}, ValueError, r"min_p must be in \[0, 1\]"),
    ({"max_new_tokens": 3, "repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0"),
    ({"max_new_tokens": 3, "n": 0}, ValueError, "n must be at least 1"),
    ({"max_new_tokens": 3, "seed": -1}, ValueError, "seed must be from 0 to"),
    ({"max_new_tokens": 3, "seed": [1, 2]}, ValueError, "one for each of the 1 prompts, got 2"),
    ({"max_new_tokens": 3, "seed": 0.5}, TypeError, "seed must be an int"),
    ({"max_new_tokens": 3, "stop": ""}, ValueError, "stop must be a non-empty string"),
    ({"max_new_tokens": 3, "stop": "x"}, ValueError, "stop strings need a tokenizer"),
    ({"max_new_tokens": 3, "stop_token_ids": ["x"]}, TypeError, "stop_token_ids must be an int, got 'x'"),
])
def test_bad_sampling_parameters_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        model.generate([[1]], **options)


def test_no_prompts_and_no_tokens_are_no_error(model):
    assert model.generate([], 5) == []
    assert model.generate([[1, 2]], 0, n=2) == [[1, 2], [1, 2]]
    assert model.generate(torch.zeros(0, 4, dtype=torch.int64), 5).shape == (0, 4)


class Holes(Letters):
    """Ids 0 and 1 add no text, and only the first 20 ids are known."""

    vocab_size = 20

    def decode(self, ids):
        assert all(i < self.vocab_size for i in ids)
        return super().decode([i for i in ids if i > 1])


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_ids_that_the_tokenizer_lacks_are_not_drawn(model, penalty):
    prompts = [[3, V - 2], [5]]
    free, bound = (model.generate(prompts, 40, seed=1, tokenizer=t, repetition_penalty=penalty) for t in (None, Holes()))
    assert max(map(max, free)) >= 20 and max(i for row in bound for i in row if i != V - 2) < 20


def test_a_stop_string_is_seen_through_tokens_without_text():
    row = generation._Row(torch.tensor([4]), SamplingParams(stop=["CD"]), Holes())
    for token in (5, 2, 0, 1, 0, 1, 0, 1):
        row.push(token)
        assert not row.ended
    row.push(3)
    assert row.ended
