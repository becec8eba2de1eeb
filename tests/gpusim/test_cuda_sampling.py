"""Sampling on the device, simulated and with -m gpu on one: the tokens that the engine's sampler draws from the same seeds."""
from dataclasses import replace

import cuda_shim
import numpy as np
import nvcc
import pytest
import torch
from cuda_machine import running_machine_code
from test_sampler import KINDS
from test_sampler import draws as cpu_draws
from test_sampler import sample as cpu_sample

from fastgpt import SamplingParams
from fastgpt.cuda.sampling import MOST_VOCABULARY, Row, draws_of, sample
from fastgpt.extension import _C
from fastgpt.sampling import uniform

pytestmark = [pytest.mark.skipif(_C is None or bool(cuda_shim.missing()), reason=str(_C and cuda_shim.missing())),
              pytest.mark.usefixtures("one_thread")]

CPU, PROMPT, LENGTH = torch.device("cpu"), 5, 12
SIMULATED = pytest.mark.parametrize("cuda", [{}], indirect=True, ids=["simulated"])
ARCHS = [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 90))]
ORDERS = pytest.mark.parametrize("cuda", [{"order": "fifo"}, {"order": "rand:2"}, pytest.param("gpu", marks=pytest.mark.gpu)],
                                 indirect=True, ids=["fifo", "rand", "gpu"])


def rows_of(params, V, count=None, length=LENGTH):
    """A Row for each of the SamplingParams, or `count` of the same ones, with histories and seeds of their own."""
    params, rng = params if count is None else [params] * count, np.random.default_rng(V)
    return [Row(p, int(rng.integers(2 ** 63)), i % 3, length + i, rng.integers(0, V, length).astype(np.int32), PROMPT)
            for i, p in enumerate(params)]


def on_cpu(logits, rows):
    """The engine's tokens."""
    logits, drawn, alive = logits.cpu().float().contiguous(), [], []
    for row in rows:
        bias = {i: b for i, b in row.params.logit_bias.items() if i < logits.shape[1]}
        number = uniform(row.seed, row.sample, row.position)
        head, kept = cpu_draws(replace(row.params, logit_bias=bias), [number], [row.ids], row.prompt)
        drawn += head
        alive.append(kept)
    return cpu_sample(logits.clone(), logits.shape[1], logits.shape[1], drawn)


def check(logits, rows):
    expected = on_cpu(logits, rows)
    tokens = sample(logits.clone(), draws_of(rows, logits.device))
    assert tokens.dtype == torch.int32 and tokens.device == logits.device
    assert torch.equal(tokens.cpu().long(), expected)
    return tokens.cpu()


def some_logits(rows, V):
    logits = torch.randn(rows, V) * 3
    logits[:rows // 4] = logits[:rows // 4].round()  # ties, and zeros of both signs
    return logits


@ORDERS
@pytest.mark.parametrize("V", [1, 33, 1000])
def test_equals_the_engine(cuda, V):
    for kind in KINDS:
        check(some_logits(40, V), rows_of(SamplingParams(**kind), V, 40))


@pytest.mark.skipif(bool(nvcc.MISSING), reason=str(nvcc.MISSING))
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch):
    kinds = [KINDS[1], KINDS[5], KINDS[-5], KINDS[-1]]
    with running_machine_code(arch):
        for V in (33, 700):
            check(some_logits(4, V), rows_of([SamplingParams(**kind) for kind in kinds], V))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_stay_as_they_are(cuda, dtype):
    logits = some_logits(8, 300).to(dtype)
    for kind in KINDS[::3]:
        before = logits.clone()
        rows = rows_of(SamplingParams(**kind), 300, 8)
        assert torch.equal(sample(logits, draws_of(rows, logits.device)).cpu().long(), on_cpu(logits, rows))
        assert torch.equal(logits, before)


@ORDERS
def test_rows_of_a_batch_are_drawn_each_in_its_own_way(cuda):
    rows = rows_of([SamplingParams(**kind) for kind in KINDS], 200)
    rows = [row._replace(ids=row.ids[:i % LENGTH], prompt=min(PROMPT, i % LENGTH)) for i, row in enumerate(rows)]
    check(some_logits(len(rows), 200), rows)


@pytest.mark.parametrize("V", [50257, MOST_VOCABULARY])
def test_large_vocabularies(cuda, V):
    kinds = [{}, {"temperature": 0.0}, {"top_k": 50, "temperature": 0.8}, {"top_p": 0.9, "repetition_penalty": 1.2}]
    check(some_logits(4, V), rows_of([SamplingParams(**kind) for kind in kinds], V))


def test_equal_logits_count_by_their_ids(cuda):
    """The number that is drawn picks a share of the ids; top-p keeps the first ids, top-k all that equal the last one."""
    V, logits = 4096, torch.zeros(24, 4096)
    rows = rows_of(SamplingParams(), V, 24)
    numbers = np.array([uniform(row.seed, row.sample, row.position) for row in rows])
    assert np.array_equal(check(logits, rows), numbers * V // 1)
    rows = [row._replace(params=SamplingParams(top_p=0.25)) for row in rows]
    assert np.array_equal(check(logits, rows), numbers * V // 4)
    rows = [row._replace(params=SamplingParams(top_k=3)) for row in rows]
    assert np.array_equal(check(logits, rows), numbers * V // 1)
    logits[:, 1000:] = -1.0
    rows = [row._replace(params=SamplingParams(top_p=0.9, top_k=2000)) for row in rows]
    assert check(logits, rows).max() > 1000


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_what_is_no_distribution_gives_no_token(cuda, bad):
    logits = torch.randn(4, 50)
    logits[1, 49], logits[2] = bad, float("-inf")
    logits[3, :49] = float("-inf")
    for kind in ({}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.0}, {"logit_bias": {3: 0.0}}):
        tokens = check(logits, rows_of(SamplingParams(**kind), 50, 4)).tolist()
        assert tokens[1:3] == [-1, -1] and tokens[0] >= 0
        assert tokens[3] == 49 or "logit_bias" in kind


def test_zeros_of_both_signs_are_equal(cuda):
    logits = torch.full((8, 40), -1.0)
    logits[:, 5:20] = -0.0
    logits[::2, 20:] = 0.0
    assert check(logits, rows_of(SamplingParams(temperature=0.0), 40, 8)).tolist() == [5] * 8


def test_tokens_of_probability_zero_are_never_drawn(cuda):
    logits = torch.full((40, 300), float("-inf"))
    logits[:, [3, 257]] = 0.0
    for kind in ({}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 1e-4}, {"temperature": 1e30, "min_p": 1.0}):
        assert set(check(logits, rows_of(SamplingParams(**kind), 300, 40)).tolist()) <= {3, 257}


def test_extreme_parameters(cuda):
    kinds = [*({"temperature": t, "top_p": 0.95} for t in (1e-5, 1e-3, 100.0, 1e30)), {"top_p": 1e-30}, {"top_p": 1e-50}, {"top_p": 1 - 1e-7},
             {"top_k": 2 ** 31 - 1}, {"min_p": 1e-30}, {"repetition_penalty": 1e30}, {"presence_penalty": -1e30}]
    for kind in kinds:
        check(some_logits(16, 500) * 10, rows_of(SamplingParams(**kind), 500, 16))


@ORDERS
def test_every_id_may_have_a_bias(cuda):
    bias = {i: float(b) for i, b in zip(torch.randperm(100).tolist(), torch.randn(100) * 5)}
    beyond = {99: 20.0, 100: 1000.0, 2 ** 40: 1000.0}
    kinds = [{"logit_bias": bias}, {}, {"logit_bias": beyond}, {"logit_bias": bias, "temperature": 1.0}]
    check(torch.randn(4, 100), rows_of([SamplingParams(**{"temperature": 0.0, **kind}) for kind in kinds], 100))


@ORDERS
def test_histories_count_each_token_once(cuda):
    """With tokens that lie outside the vocabulary, that the prompt and the rest share, and that come often."""
    V, params = 20, SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, temperature=0.0)
    logits = torch.randn(30, V) * 0.3
    rows = rows_of(params, V, 30, length=60)
    for row in rows:
        row.ids[::7] = (-1, V, 2 ** 31 - 1)[row.position % 3]
    draws = draws_of(rows, logits.device)
    draws.counts = torch.zeros(30, V, dtype=torch.int32)
    expected = on_cpu(logits, rows)
    for _ in range(2):
        assert torch.equal(sample(logits.clone(), draws).cpu().long(), expected)
        assert not draws.counts.any()
    assert not torch.equal(expected, logits.argmax(1).cpu())


def test_only_the_first_ids_of_a_row_are_looked_at(cuda):
    wide = torch.randn(20, 50)
    wide[:, 40:] = 100.0
    rows = rows_of(SamplingParams(top_p=0.9), 40, 20)
    expected, out = on_cpu(wide[:, :40], rows), torch.full((20,), -7, dtype=torch.int32)
    assert sample(wide[:, :40], draws_of(rows, wide.device), out=out) is out
    assert torch.equal(out.cpu().long(), expected)
    assert (wide[:, 40:] == 100.0).all()
    assert sample(wide[:0], draws_of([], wide.device)).shape == (0,)


def test_launch_rule(cuda):
    for V in (1, 65, 512, 513, 1000, 4096, 8192, 50257, MOST_VOCABULARY):
        threads = cuda.library.sampling_threads(V)
        assert threads in (64, 128, 256, 512, 1024)
        assert (threads * 8 >= V or threads == 1024) and (threads == 64 or threads * 4 < V)


@SIMULATED
def test_an_error_of_the_launch_names_it(cuda):
    cuda.library.fail_next_launch("out of luck")
    with pytest.raises(RuntimeError, match=r"sample\(dtype=0, R=2, V=9\): out of luck"):
        sample(torch.zeros(2, 9), draws_of(rows_of(SamplingParams(), 9, 2), CPU))


LOGITS = torch.zeros(2, 9)


@pytest.mark.parametrize("logits, changes, message", [
    (torch.zeros(9), {}, r"logits must be \(R, V\), .* got \(9,\)"),
    (torch.zeros(2, 0), {}, r"got \(2, 0\)"),
    (torch.zeros(9, 2).t(), {}, r"strides \(1, 2\)"),
    (torch.empty(1, MOST_VOCABULARY + 1), {}, "V from 1 to 1048576"),
    (LOGITS.double(), {}, "float32, float16 or bfloat16, got torch.float64"),
    (LOGITS, {"top_k": torch.zeros(3, dtype=torch.int32)}, r"top_k must be .* torch.int32 of shape \(2,\), got .* \(3,\)"),
    (LOGITS, {"seed": torch.zeros(2, dtype=torch.int32)}, "seed must be a contiguous torch.int64"),
    (LOGITS, {"min_p": torch.zeros(2, dtype=torch.float64)}, "min_p must be a contiguous torch.float32"),
    (LOGITS, {"counts": torch.zeros(2, 8, dtype=torch.int32)}, r"counts .* \(2, 9\), got .* \(2, 8\)"),
    (LOGITS, {"bias_starts": torch.zeros(2, dtype=torch.int32)}, r"bias_starts .* \(3,\)"),
    (LOGITS, {"bias": None}, "bias_starts, bias_ids, bias come together, got bias_starts, bias_ids alone"),
    (LOGITS, {"history": None}, "history come together"),
    (LOGITS.to("meta"), {}, "on meta")])
def test_what_does_not_fit_is_named(logits, changes, message):
    draws = draws_of(rows_of(SamplingParams(repetition_penalty=2.0, logit_bias={1: 1.0}), 9, 2), CPU)
    with pytest.raises(ValueError, match=message):
        sample(logits, replace(draws, **changes))
