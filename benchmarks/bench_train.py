"""A training step of GPT-2 against PyTorch's models: python -m benchmarks.bench_train [--quick] [--save train]

Batch 4 x 256 of random tokens, AdamW included, no dropout. Each variant is a process of its own; they take turns.
Figures: tokens a second, peak memory of the process, the share of the arithmetic peak of the same run. A variant whose
losses differ from the first PyTorch variant's has no figures. The last line is one JSON document.
"""
import argparse
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks import ceilings, results
from benchmarks.machine import describe, one_line
from benchmarks.neighbours import QUICK_PATIENCE, Neighbours
from benchmarks.processes import Process
from benchmarks.threads import thread_counts, use_threads
from benchmarks.timing import compare, spread
from benchmarks.training import KINDS, LOSS_TOLERANCE, MODELS

# Of every process, as `fastgpt train` sets them up: PyTorch's threads asleep between its ops, freed memory kept.
SURROUNDINGS = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 40)}
OURS, BASELINE, COMPILED = "fastgpt", "nanogpt", "nanogpt+compile"
VARIANTS = (OURS, BASELINE, COMPILED, "transformers")
# dtype -> rival -> how many times as fast ours should be; and the share of the baseline's peak memory that it may take.
TARGETS = {"float32": {BASELINE: 2.2, COMPILED: 1.0}, "bfloat16": {BASELINE: 1.4, COMPILED: 1.0}}
MEMORY_TARGET = 0.7


def flops_per_token(config, length):
    """Of a training step: 6 for each weight of a product, and attention's products over the pairs j <= i."""
    C, L = config.n_embd, config.n_layer
    parameters = 12 * L * C * C + config.vocab_size * C
    return 6 * parameters + 6 * L * C * (length + 1)


def step_flops(settings):
    return settings["batch"] * settings["length"] * flops_per_token(MODELS[settings["model"]], settings["length"])


def pytorch_seconds(dtype, flops):
    """About what a PyTorch step of so many operations takes, by the speed of its three kinds of products."""
    M, C = 256, 768
    x, w, y = (torch.randn(rows, C).to(getattr(torch, dtype)) for rows in (M, C, M))
    products = (lambda: F.linear(x, w), lambda: y @ w, lambda: y.t() @ x)
    return flops * sum(_seconds(product) for product in products) / (len(products) * 2 * M * C * C)


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def children(settings, dtype, threads):
    """-> (the processes that take part, name -> why another one does not)."""
    expected = pytorch_seconds(dtype, step_flops(settings))
    slow = expected > settings["cap"]
    reason = (f"not started: by PyTorch's {dtype} products a step would take about {expected:.0f} s, over the cap of "
              f"{settings['cap']:g} s")
    numbers = [str(n) for n in (settings["batch"], settings["length"], threads)]
    command = [sys.executable, "-m", "benchmarks.training"]
    started = [name for name in settings["variants"] if name.startswith(OURS) or not slow]
    processes = [Process(name, [*command, name, dtype, settings["model"], *numbers], limit=settings["cap"],
                         env={"OMP_NUM_THREADS": str(threads), **SURROUNDINGS}) for name in started]
    return processes, {name: reason for name in settings["variants"] if name not in started}


def measure(settings, dtype, threads, neighbours, curve=None):
    """The rows of one dtype on so many threads. curve: the losses to expect if no PyTorch variant of the dtype runs."""
    top = ceilings.arithmetic(ceilings.arithmetic_kind(dtype), threads)
    with use_threads(threads):
        processes, left_out = children(settings, dtype, threads)
        try:
            result = compare([*processes, *([top.variant()] if top else [])], rounds=settings["rounds"],
                             budget=settings["budget"], neighbours=neighbours)
        finally:
            for process in processes:
                process.close()
    result.failures.update(left_out)
    heads = {process.name: process.head for process in processes}
    check_losses(result, heads, dtype, curve)
    return [_row(settings, (dtype, threads), name, heads.get(name), result, top) for name in settings["variants"]]


def check_losses(result, heads, dtype, curve=None):
    """Fails the contestants whose losses are not those of the first PyTorch variant, or else of `curve`."""
    curves = {name: [heads[name]["first_loss"], *(s.values["loss"] for s in samples)]
              for name, samples in result.samples.items() if name in heads}
    expected = next((losses for name, losses in curves.items() if not name.startswith(OURS)), curve)
    if expected is None:
        return
    for name, losses in curves.items():
        for i, (loss, other) in enumerate(zip(losses, expected)):
            if not abs(loss - other) <= LOSS_TOLERANCE[dtype] * abs(other):
                result.fail(name, AssertionError(f"the loss of step {i} is {loss:.6f}, expected {other:.6f}"))
                break


def _row(settings, kind, name, head, result, top):
    dtype, threads = kind
    tokens, flops = settings["batch"] * settings["length"], step_flops(settings)
    seconds = result.timing(name)
    row = {"variant": name, "dtype": dtype, "threads": threads, "seconds": seconds,
           "failure": result.failures.get(name), "dirty": result.dirty(name), "base_mb": head and head["base_mb"],
           "tokens_per_second": None, "gflops": None, "share": None, "ceiling": None, "peak_mb": None, "losses": None,
           "ratios": {}, "memory": {}}
    if seconds:
        samples = result.samples[name]
        row["tokens_per_second"] = spread(tokens / s.seconds for s in samples)
        row["gflops"] = flops / seconds["median"] / 1e9
        row["peak_mb"] = samples[-1].values["peak_mb"]
        row["losses"] = [head["first_loss"], *(s.values["loss"] for s in samples)]
        if top:
            row["ceiling"] = top.name
            row["share"] = result.shares(name, lambda seconds: flops / top.work * seconds[top.name])
        if name == OURS:
            _compare_ours(row, result, [n for n in settings["variants"] if n != OURS and result.samples.get(n)])
    return row


def _compare_ours(row, result, rivals):
    row["ratios"] = {rival: result.ratio(OURS, rival) for rival in rivals}
    row["memory"] = {rival: row["peak_mb"] / result.samples[rival][-1].values["peak_mb"] for rival in rivals}
    targets = TARGETS[row["dtype"]]
    row["targets"] = {**{rival: targets[rival] for rival in rivals if rival in targets}, "memory": MEMORY_TARGET}
    row["met"] = {rival: row["ratios"][rival]["median"] >= targets[rival] for rival in rivals if rival in targets}
    if BASELINE in row["memory"]:
        row["met"]["memory"] = row["memory"][BASELINE] <= MEMORY_TARGET


COLUMNS = "{:16} {:9} {:>3} {:>20} {:>9} {:>26} {:>8}  {}"


def print_rows(rows):
    print(COLUMNS.format("variant", "dtype", "thr", "tokens/s (quartiles)", "GFLOP/s", "share of its ceiling",
                         "peak MB", "ours is"))
    for row in rows:
        if row["failure"]:
            print(f"{row['variant']:16} {row['dtype']:9} {row['threads']:3} no figures: {row['failure']}")
            continue
        speed, share = row["tokens_per_second"], row["share"]
        ours = [f"{ratio['median']:.2f} x {rival} ({ratio['q1']:.2f}..{ratio['q3']:.2f}) "
                f"at {row['memory'][rival]:.2f} of its memory" for rival, ratio in row["ratios"].items()]
        disturbed = f" [{row['dirty']} samples disturbed]" if row["dirty"] else ""
        print(COLUMNS.format(
            row["variant"], row["dtype"], row["threads"],
            f"{speed['median']:.1f} ({speed['q1']:.1f}..{speed['q3']:.1f})", f"{row['gflops']:.1f}",
            f"{share['median']:.0%} {row['ceiling']}" if share else "-", f"{row['peak_mb']:.0f}",
            "; ".join(ours) + disturbed), flush=True)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*KINDS, *(f"{kind}+compile" for kind in KINDS)]
    parser.add_argument("--variants", nargs="+", choices=names, default=list(VARIANTS))
    parser.add_argument("--dtypes", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--threads", nargs="+", type=int, default=thread_counts())
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=90.0, help="seconds for each dtype and number of threads")
    parser.add_argument("--cap", type=float, default=180.0, help="seconds that a variant's start, or a step, may take")
    parser.add_argument("--quick", action="store_true", help="3 rounds, a cap of 60 seconds")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    settings = vars(parser.parse_args(argv))
    if settings["quick"]:
        settings.update(rounds=3, cap=60.0)
    return settings, settings.pop("save")


def main(argv=None):
    settings, save = parse(argv)
    print(one_line(describe()))
    neighbours = Neighbours(patience=QUICK_PATIENCE) if settings["quick"] else Neighbours()
    rows, tops = [], []
    for threads in settings["threads"]:
        with use_threads(threads):
            tops += ceilings.measure(threads, neighbours=neighbours)
        curve = None
        for dtype in settings["dtypes"]:
            found = measure(settings, dtype, threads, neighbours, curve)
            curve = next((row["losses"] for row in found if row["losses"]), curve)
            print_rows(found)
            rows += found
    results.finish(results.document("train", settings, tops, rows), save)


if __name__ == "__main__":
    main()
