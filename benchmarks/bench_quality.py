"""What each of the engine's dtypes costs in likelihood: python -m benchmarks.bench_quality input.txt [--save quality]

The model that ships reads the last tenth of a text (of tinyshakespeare: the part that it never saw) in windows of its
context, as it is and in a form of the same function whose channels behind the norms have outliers, as GPT-2's have. The
reference is the engine in float32. No clock is involved. The last line is one JSON document; its rows:

    model, dtype      the shipped model, "plain" or "outliers x 50"; the engine's dtype
    nats              the mean negative log-likelihood of a token
    perplexity        relative to float32's: 0.01 is 1 % more
    top_1             of the tokens, how many have the same likeliest token as in float32
    kl                the mean Kullback-Leibler divergence from float32's distributions, nats
    targets, verdicts "perplexity": what it should be at most, and whether it is "met"
"""
import argparse
import sys
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.machine import ROOT, describe, one_line
from fastgpt import GPT, LLM, Tokenizer
from fastgpt.extension import _C
from fastgpt.loading import SHIPPED

sys.path.append(str(ROOT / "tests"))
from engines import with_outliers

TARGETS = {"int8": 0.005, "int4": 0.03}
OUTLIERS = 50.0


def windows(path, model, tokenizer, count):
    """(count, T) ids of the last tenth of a text."""
    text = Path(path).read_text(encoding="utf-8")
    ids, T = torch.tensor(tokenizer.encode(text[len(text) * 9 // 10:])), model.config.block_size
    return ids[:len(ids) // T * T].view(-1, T)[:count]


def log_probabilities(model, dtype, ids):
    """(tokens, V) float64: of every token of every window but its first."""
    llm = LLM(model, dtype=dtype)
    return torch.cat([torch.from_numpy(llm.logits(row.tolist())).double().log_softmax(1)[:-1] for row in ids])


def measure(name, model, ids):
    targets, truth = ids[:, 1:].flatten(), None
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        found = log_probabilities(model, dtype, ids)
        truth = found if truth is None else truth
        nats, best = (-p.gather(1, targets[:, None]).mean() for p in (found, truth))
        row = {"model": name, "dtype": dtype, "nats": float(nats), "perplexity": float((nats - best).expm1()),
               "top_1": float((found.argmax(1) == truth.argmax(1)).double().mean()),
               "kl": float((truth.exp() * (truth - found)).sum(1).mean()),
               "targets": {"perplexity": TARGETS[dtype]} if dtype in TARGETS else {}}
        row["verdicts"] = {target: "met" if row[target] <= most else "missed" for target, most in row["targets"].items()}
        print(f"{name:>14} {dtype:>9}: {row['nats']:.4f} nats, perplexity {row['perplexity']:+.3%}, top-1 {row['top_1']:.2%}, "
              f"KL {row['kl']:.1e}", flush=True)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--save", metavar="NAME")
    settings = vars(parser.parse_args())
    model, tokenizer = GPT.from_pretrained(SHIPPED).eval(), Tokenizer.from_pretrained(SHIPPED)
    ids = windows(settings.pop("text"), model, tokenizer, settings["windows"])
    settings["tokens"], settings["dots"], save = ids.numel(), _C.engine_dots(), settings.pop("save")
    print(one_line(describe()))
    models = {"plain": model, f"outliers x {OUTLIERS:g}": with_outliers(model, OUTLIERS)}
    rows = [row for name, variant in models.items() for row in measure(name, variant, ids)]
    results.finish(results.document("quality", settings, [], rows), save)


if __name__ == "__main__":
    main()
