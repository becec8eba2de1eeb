"""The engine's sampler against its reference in PyTorch: the same numbers drawn give the same tokens."""
import numpy as np
import pytest
import torch

from fastgpt import SamplingParams, torch_sampling
from fastgpt.engine.memory import address
from fastgpt.extension import _C

pytestmark = pytest.mark.skipif(_C is None, reason="needs the extension")
ROWS = 400
KINDS = [{}, {"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 7}, {"top_k": 10 ** 6},
         {"top_p": 0.6}, {"top_p": 0.99}, {"top_p": 1e-6}, {"min_p": 0.2}, {"min_p": 1.0},
         {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.01},
         {"repetition_penalty": 1.5}, {"presence_penalty": 0.7}, {"frequency_penalty": -0.4, "temperature": 0.0},
         {"logit_bias": {0: 2.0, 5: -100.0, 10 ** 6: 1.0}, "repetition_penalty": 0.8, "top_p": 0.8}]


def draws(params, uniforms, histories, prompt):
    ids, bias = np.array(list(params.logit_bias), np.int32), np.array(list(params.logit_bias.values()), np.float32)
    head = (params.temperature, params.top_k or 0, params.top_p, params.min_p, params.repetition_penalty,
            params.presence_penalty, params.frequency_penalty)
    rows = [(*head, float(u), address(history), prompt, len(history), address(ids), address(bias), len(ids))
            for u, history in zip(uniforms, histories)]
    return rows, (ids, bias)


def counts_of(histories, prompt, V):
    counts = torch.zeros(len(histories), V, dtype=torch.int32)
    for row, history in zip(counts, histories):
        row[torch.tensor(history[:prompt], dtype=torch.int64)] = -1
        for token in history[prompt:].tolist():
            row[token] = max(int(row[token]), 0) + 1
    return counts


def sample(logits, stride, V, rows):
    out = np.full(len(logits), -7, np.int32)
    _C.sample(logits.data_ptr(), stride, V, rows, address(out))
    return torch.from_numpy(out).long()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("V", [1, 33, 1000])
def test_equals_the_reference(level, kind, V):
    params, rng = SamplingParams(**kind), np.random.default_rng(V)
    logits = torch.randn(ROWS, V) * 3
    logits[:50] = logits[:50].round()  # ties
    histories = [rng.integers(0, V, 12).astype(np.int32) for _ in range(ROWS)]
    uniforms = torch.rand(ROWS, dtype=torch.float64)
    counts = counts_of(histories, 5, V) if params.penalises else None
    expected = torch_sampling.choose(logits, params, counts, uniforms)
    rows, alive = draws(params, uniforms, histories, 5)
    tokens = sample(logits.clone(), V, V, rows)
    # Where a draw falls within rounding of two tokens' border, either is right.
    assert (tokens == expected).double().mean() >= 0.99
    assert alive and ((tokens >= 0) & (tokens < V)).all()


def test_only_the_first_entries_of_a_row_are_looked_at(level):
    logits = torch.randn(20, 50)
    logits[:, 40:] = 100.0
    rows, _ = draws(SamplingParams(temperature=0), torch.zeros(20), [np.zeros(0, np.int32)] * 20, 0)
    assert torch.equal(sample(logits.clone(), 50, 40, rows), logits[:, :40].argmax(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_distribution_is_refused(level, bad):
    logits = torch.randn(3, 50)
    logits[1, 49] = bad
    logits[2] = float("-inf")
    rows, _ = draws(SamplingParams(top_p=0.9), torch.zeros(3), [np.zeros(0, np.int32)] * 3, 0)
    tokens = sample(logits, 50, 50, rows)
    assert tokens[0] >= 0
    assert tokens[1:].tolist() == [-1, -1]


def test_tokens_of_probability_zero_are_never_drawn(level):
    logits = torch.full((200, 30), float("-inf"))
    logits[:, [3, 17]] = 0.0
    uniforms = torch.linspace(0, 1 - 1e-12, 200, dtype=torch.float64)
    for kind in ({}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 1e-4}):
        rows, _ = draws(SamplingParams(**kind), uniforms, [np.zeros(0, np.int32)] * 200, 0)
        assert set(sample(logits.clone(), 30, 30, rows).tolist()) <= {3, 17}
