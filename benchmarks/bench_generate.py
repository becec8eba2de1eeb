"""Prefill and decoding against transformers: python -m benchmarks.bench_generate [--quick] [--save generate]

Greedy, random weights, no end token. Scenario: batch x prompt + new tokens. Prefill is the time to the first token;
decoding what the others take, tokens a second over the batch. A variant whose tokens are not the likeliest ones under
fastgpt's reference, which takes part too, has no figures. The last line is one JSON document.
"""
import argparse
import time

import torch

from benchmarks import ceilings, peers, results
from benchmarks.machine import describe, one_line
from benchmarks.neighbours import QUICK_PATIENCE, Neighbours
from benchmarks.threads import thread_counts, use_threads
from benchmarks.timing import Failure, Sample, Variant, compare, spread
from benchmarks.training import MODELS
from fastgpt import GPT, ops

OURS = "fastgpt"
# name -> (batch, prompt, new)
SCENARIOS = {"decode": (1, 32, 64), "batch": (16, 32, 32), "prefill": (1, 512, 2), "tiny": (2, 5, 4)}
CHECKED_ROWS = 2
# A token counts as the likeliest one if its logit is below the largest by no more than this share of the logits'
# standard deviation: both sides' float32 rounding, far below the distance between likely tokens.
TIE = 1e-4


class Fastgpt:
    def __init__(self, model, backend="auto"):
        self.model, self.backend = model, backend

    def generate(self, prompts, new, on_token):
        with ops.backend(self.backend):
            return self.model.generate(prompts, new, temperature=0.0, streamer=lambda row, token: on_token())


class Transformers:
    def __init__(self, model):
        peer = peers.Transformers(model.config)
        peer.load_state_dict(model.state_dict())
        self.model = peer.model.eval()

    def generate(self, prompts, new, on_token):
        """transformers hands a streamer the prompt first, and refuses one for a batch: its forward is watched."""
        hook = self.model.register_forward_hook(lambda *_: on_token())
        try:
            return self.model.generate(prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
                                       attention_mask=torch.ones_like(prompts))
        finally:
            hook.remove()


class Generation(Variant):
    """A contestant whose sample has the seconds to the first token, and the rate of the tokens after it."""

    def __init__(self, name, engine, prompts, new, check):
        super().__init__(name, self.once, check=lambda: check(self.once()))
        self.engine, self.prompts, self.new = engine, prompts, new
        self.first = None

    def _on_token(self):
        if self.first is None:
            self.first = time.perf_counter()

    def once(self):
        self.first = None
        with torch.no_grad():
            return self.engine.generate(self.prompts, self.new, self._on_token)

    def sample(self, evict=None):
        cpu, start = time.process_time(), time.perf_counter()
        self.once()
        end = time.perf_counter()
        steps = len(self.prompts) * (self.new - 1)
        values = {"prefill_seconds": self.first - start, "seconds_per_token": (end - self.first) / steps}
        return Sample(end - start, time.process_time() - cpu, values)


def check_greedy(model, prompts, new, ids):
    """Raises Failure when a new token of the first rows is not the likeliest one after those before it."""
    if tuple(ids.shape) != (len(prompts), prompts.shape[1] + new):
        raise Failure(f"gave ids of shape {tuple(ids.shape)}")
    rows = ids[:CHECKED_ROWS]
    with torch.no_grad(), ops.backend("reference"):
        logits = model(rows[:, :-1], rows[:, 1:].contiguous())[0][:, prompts.shape[1] - 1:]  # (rows, new, V)
    chosen = logits.gather(2, rows[:, prompts.shape[1]:, None])[..., 0]
    short = (logits.amax(2) - chosen) / logits.std(2)
    if not (short <= TIE).all():
        raise Failure(f"a token is not the likeliest: its logit is {short.max():.2g} deviations below the largest")


def contestants(model, prompts, new):
    """Name -> contestant."""
    engines = {OURS: Fastgpt(model), "reference": Fastgpt(model, "reference"), "transformers": Transformers(model)}
    return {name: Generation(name, engine, prompts, new, lambda ids: check_greedy(model, prompts, new, ids))
            for name, engine in engines.items()}


def measure(model, scenario, threads, settings, neighbours):
    """The rows of one scenario."""
    batch, prompt, new = SCENARIOS[scenario]
    prompts = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(2))
    engines = contestants(model, prompts, new)
    top = ceilings.reading("memory", threads)
    with use_threads(threads):
        result = compare([*engines.values(), *([top.variant()] if top else [])], rounds=settings["rounds"],
                         budget=settings["budget"], neighbours=neighbours)
    weights = sum(p.nbytes for p in model.parameters()) - model.transformer.wpe.weight.nbytes  # read for each step
    return [_row(result, name, scenario, threads, weights, top) for name in engines]


def _row(result, name, scenario, threads, weights, top):
    batch, prompt, new = SCENARIOS[scenario]
    row = {"variant": name, "scenario": scenario, "batch": batch, "prompt": prompt, "new": new, "threads": threads,
           "dtype": "float32", "failure": result.failures.get(name), "dirty": result.dirty(name), "ratios": {},
           "prefill_tokens_per_second": None, "decode_tokens_per_second": None, "share": None, "ceiling": None}
    samples = result.samples.get(name)
    if samples:
        row["prefill_tokens_per_second"] = spread(batch * prompt / s.values["prefill_seconds"] for s in samples)
        row["decode_tokens_per_second"] = spread(1 / s.values["seconds_per_token"] for s in samples)
        if top:  # a step reads each weight once, for the whole batch
            row["ceiling"] = top.name
            row["share"] = spread(weights / (s.values["seconds_per_token"] * batch) / top.rate(t.seconds)
                                  for s, t in zip(samples, result.samples[top.name]))
    if name == OURS:
        rivals = [rival for rival in result.samples if rival not in (OURS, top and top.name)]
        row["ratios"] = {value: {rival: result.ratio(OURS, rival, value) for rival in rivals}
                         for value in ("prefill_seconds", "seconds_per_token")}
    return row


COLUMNS = "{:13} {:9} {:>16} {:>3} {:>12} {:>12} {:>20}  {}"


def print_rows(rows):
    for row in rows:
        if row["failure"]:
            print(f"{row['variant']:13} {row['scenario']:9} no figures: {row['failure']}", flush=True)
            continue
        ours = [f"{kind.split('_')[0].replace('seconds', 'decode')} {ratio['median']:.2f} x {rival}"
                for kind, rivals in row["ratios"].items() for rival, ratio in rivals.items() if ratio]
        share = f"{row['share']['median']:.0%} {row['ceiling']}" if row["share"] else "-"
        print(COLUMNS.format(
            row["variant"], row["scenario"], f"{row['batch']} x {row['prompt']} + {row['new']}", row["threads"],
            f"{row['prefill_tokens_per_second']['median']:.0f}", f"{row['decode_tokens_per_second']['median']:.1f}",
            share, "; ".join(ours)), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["decode", "batch", "prefill"])
    parser.add_argument("--threads", nargs="+", type=int, default=thread_counts())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for each scenario and number of threads")
    parser.add_argument("--quick", action="store_true", help="3 rounds within 15 seconds each")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    settings = vars(parser.parse_args(argv))
    save = settings.pop("save")
    if settings["quick"]:
        settings.update(rounds=3, budget=15.0)
    print(one_line(describe()))
    torch.manual_seed(0)
    model = GPT(MODELS[settings["model"]]).eval()
    print(COLUMNS.format("variant", "scenario", "batch x in + out", "thr", "prefill t/s", "decode t/s",
                         "share of its ceiling", "ours is"))
    neighbours = Neighbours(patience=QUICK_PATIENCE) if settings["quick"] else Neighbours()
    rows = []
    for scenario in settings["scenarios"]:
        for threads in settings["threads"]:
            found = measure(model, scenario, threads, settings, neighbours)
            print_rows(found)
            rows += found
    results.finish(results.document("generate", settings, [], rows), save)


if __name__ == "__main__":
    main()
