"""Generation on an NVIDIA GPU, a part of bench_gpu: `fastgpt.LLM` beside transformers' generate, torch.compile and vLLM.

As on the CPU (bench_generate): greedy, random weights, no end token, every engine at every dtype in a process of its own,
idle between its turns; one whose tokens are not the likeliest under fastgpt's float32 reference has no figures. Its rows,
beside what all of bench_gpu's have:

    seconds                    of a token, over the whole batch; of a prompt alone, where one token is made, of them all
    tokens_per_second          that were made, or read where one is made
    prefill_tokens_per_second  of the prompts, up to the first new token of all of them
    cost                       {"bytes", "flops"} that a token takes at least: weights, keys and values are read once
    share, ceiling             the least time for that by what a copy or a product reached in the same rounds
    shortfall                  of its tokens, as contestants.py checks it: what its rounding costs in likelihood
    same_tokens                how many of the first tokens are those of ours, in the worst of the checked rows
"""
import os
import tempfile

import torch

from benchmarks import decoding, timing
from benchmarks.contestants import CHECKED_ROWS, Contestant, Models
from benchmarks.gpu_timing import ceiling_calls, compare
from benchmarks.peers import GPU_DTYPES, GPU_RIVALS, OURS

SCENARIOS = ("decode", "batch", "many", "long", "prefill")
TINY = ("tiny",)
ROUNDS, BUDGET = 7, 60.0  # seconds, of one scenario and dtype
CAP = 150.0  # seconds that a run may take; a start may take four times as long: vLLM compiles first


def rows(timer, tops, device="cuda", gpt2=True, *, scenarios=None, dtypes=GPU_DTYPES, pythons=None, log=os.devnull):
    """A row for each engine in each scenario and dtype. pythons: rival -> the Python that has it. log: the file for what
    the engines print."""
    torch.cuda.empty_cache()  # the engines are other processes
    calls = ceiling_calls(timer, device) if gpt2 else ceiling_calls(timer, device, 1 << 10, 8)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(folder, pythons or {}, log)
        for scenario in scenarios or (SCENARIOS if gpt2 else TINY):
            for dtype in dtypes:
                yield from measure(models, (scenario, dtype), timer, calls)


def measure(models, key, timer, calls):
    """The rows of one (scenario, dtype). calls: `ceiling_calls`' contestants."""
    name, dtype = key
    engines = [Contestant(engine, (engine, dtype, "cuda"), decoding.SCENARIOS[name], models, CAP)
               for engine in (OURS, *GPU_RIVALS)]
    try:
        result = compare([*engines, *calls], timer, rounds=min(ROUNDS, timer.rounds), budget=BUDGET)
    finally:
        for engine in engines:
            engine.close()
    return [_row(engine, key, result, calls, engines[0].head) for engine in engines]


def _row(engine, key, result, calls, ours):
    """ours: fastgpt's first message, or None."""
    s, head, name = engine.scenario, engine.head or {}, engine.name
    seconds = result.timing(name, s.measure)
    found = {"spec": f"generation, {key[0]}", "what": f"{s.label()}, {key[1]}", "contestant": name, "dtype": key[1],
             "batch": s.batch, "prompt": s.prompt, "new": s.new, "version": head.get("version"),
             "precision": engine.precision, "seconds": seconds, "tokens_per_second": None,
             "prefill_tokens_per_second": None, "weight_bytes": head.get("weight_bytes"), "cost": None, "ceiling": None,
             "share": None, "shortfall": engine.shortfall, "same_tokens": _same(head.get("ids"), (ours or {}).get("ids")),
             "ratio": None if name == OURS else result.ratio(OURS, name, s.measure), "failure": result.failures.get(name)}
    if seconds:
        tokens = s.batch * s.prompt if s.new == 1 else 1  # of which `seconds` are the time
        found["tokens_per_second"] = timing.rate(seconds, tokens)
        found["prefill_tokens_per_second"] = timing.rate(result.timing(name, "first_seconds"), s.batch * s.prompt)
        found["cost"] = decoding.cost(decoding.MODELS[s.model], s, key[1], head["weight_bytes"])
        work = {"copy": found["cost"]["bytes"] * tokens}
        if key[1] != "float32":  # whose products are not those that the ceiling is measured with
            work["matmul"] = found["cost"]["flops"] * tokens
        _add_share(found, work, result, calls, s.measure)
    return found


def _add_share(found, work, result, calls, measure):
    """work: ceiling -> the least of its work that `seconds` hold."""
    units = {call.name: work[call.name] / call.work for call in calls if call.name in work and result.samples.get(call.name)}
    if units:
        least = {name: unit * result.timing(name)["median"] for name, unit in units.items()}
        ceiling = found["ceiling"] = max(least, key=least.get)
        found["share"] = result.shares(found["contestant"], lambda seconds: units[ceiling] * seconds[ceiling], measure)


def _same(ids, ours):
    """How many of the first tokens agree, in the worst of the rows that are checked; None where there are none."""
    if ids is None or ours is None:
        return None
    rows = [[a == b for a, b in zip(*pair)] for pair in zip(ids[:CHECKED_ROWS], ours[:CHECKED_ROWS])]
    return min([*row, False].index(False) for row in rows)
