"""Decoding against the best engines there are: python -m benchmarks.bench_generate [--quick] [--save generate]

Greedy, random weights, no end token. Every engine at every precision is a process of its own, loaded once, idle
between its turns; shares are of the read bandwidth of the same rounds. An engine whose tokens are not the likeliest
under fastgpt's float32 reference has no figures; one that is missing or refuses is listed with its reason. The rivals:
`pip install '.[peers]'`. The last line is one JSON document; its rows:

    variant, precision, version   the engine, what it calls its dtype, its version; None if it never started
    failure                       why it has no figures
    shortfall                     of its tokens, as contestants.py checks it: what its rounding costs in likelihood
    prefill_tokens_per_second     of the prompts, up to the first new token of all of them
    decode_tokens_per_second      of the tokens after it, over the whole batch
    share, ceiling                the bytes of its matrices a second, of the read bandwidth of the same round
    load_mb, peak_mb              the process's peak memory (VmHWM) until it was loaded, and after that
    cost, floors                  {"bytes", "flops"} that a token takes at least; the seconds of each by its ceiling
    ratios, best                  of ours: rival -> how many times as fast ours is, round by round; the one that
                                  comes nearest, of the same dtype
    targets, verdicts             of ours: target -> what it should be, and whether it is "met", "missed" or "unknown"
"""
import argparse
import contextlib
import itertools
import os
import tempfile

from benchmarks import ceilings, decoding, results
from benchmarks.contestants import Contestant, Models
from benchmarks.decoding import BASELINE, SCENARIOS
from benchmarks.machine import describe, one_line
from benchmarks.neighbours import QUICK_PATIENCE, Neighbours
from benchmarks.peers import DTYPES, OURS, RIVALS
from benchmarks.threads import thread_counts, use_threads
from benchmarks.timing import compare, rate

CEILING_SECONDS = 0.25  # of a sample: what memory gives for an instant says little about a run of a second
DEFAULT_SCENARIOS = ("decode", "batch", "prefill", "long", "small")


def contestants(settings, models, key):
    """key: (scenario, dtype, threads). Ours first; where a target needs it, the baseline beside the dtype's rivals."""
    name, dtype, threads = key
    scenario, cap = SCENARIOS[name], settings["cap"]
    found = [Contestant(engine, (engine, dtype, threads), scenario, models, cap)
             for engine in (OURS, *settings["rivals"])]
    baseline = BASELINE.split()
    if BASELINE in decoding.targets(*key) and dtype != baseline[1] and baseline[0] in settings["rivals"]:
        found.append(Contestant(BASELINE, (*baseline, threads), scenario, models, cap))
    return found


def tops(key):
    """The ceilings of a run: reading from where the weights live, and the dtype's arithmetic; None where unknown."""
    name, dtype, threads = key
    kind = "int8 dot" if dtype.startswith("int") else ceilings.arithmetic_kind(dtype)
    size = decoding.matrix_bytes(decoding.MODELS[SCENARIOS[name].model], dtype)
    return (ceilings.reading(ceilings.home(size, threads), threads),
            ceilings.arithmetic(kind, threads) if ceilings.available(kind) else None)


def measure(settings, models, key, neighbours):
    """The rows of one (scenario, dtype, threads)."""
    engines, (reading, arithmetic) = contestants(settings, models, key), tops(key)
    with use_threads(key[2]):
        try:
            result = compare([*engines, *(top.variant(CEILING_SECONDS) for top in (reading, arithmetic) if top)],
                             rounds=settings["rounds"], budget=settings["budget"], neighbours=neighbours)
        finally:
            for engine in engines:
                engine.close()
    rows = [_row(engine, key, result, reading, arithmetic) for engine in engines]
    _compare_ours(rows[0], engines, key, result)
    return rows


def _row(engine, key, result, reading, arithmetic):
    s, head = engine.scenario, engine.head or {}
    row = {"variant": engine.name, "precision": engine.precision, "version": head.get("version"), "scenario": key[0],
           "batch": s.batch, "prompt": s.prompt, "new": s.new, "dtype": key[1], "threads": key[2],
           "failure": result.failures.get(engine.name), "dirty": result.dirty(engine.name),
           "shortfall": engine.shortfall, "load_mb": head.get("load_mb"), "peak_mb": None,
           "weight_bytes": head.get("weight_bytes"), "prefill_tokens_per_second": None,
           "decode_tokens_per_second": None, "share": None, "ceiling": reading and reading.name, "cost": None,
           "floors": {}, "ratios": {}, "best": None, "targets": {}, "verdicts": {}}
    if result.samples.get(engine.name):
        row["peak_mb"] = result.samples[engine.name][-1].values["peak_mb"]
        row["prefill_tokens_per_second"] = rate(result.timing(engine.name, "first_seconds"), s.batch * s.prompt)
        if s.new > 1:
            row["decode_tokens_per_second"] = rate(result.timing(engine.name, "token_seconds"), 1)
        _add_costs(row, engine, result, reading, arithmetic)
    return row


def _add_costs(row, engine, result, reading, arithmetic):
    s = engine.scenario
    row["cost"] = decoding.cost(decoding.MODELS[s.model], s, engine.dtype, row["weight_bytes"])
    if arithmetic:
        peak = arithmetic.rate(result.timing(arithmetic.name)["median"])
        row["floors"][arithmetic.name] = row["cost"]["flops"] / peak
    if reading:
        row["floors"][reading.name] = row["cost"]["bytes"] / reading.rate(result.timing(reading.name)["median"])
        if s.new > 1:  # a step reads the matrices once, for the whole batch
            a_token = row["weight_bytes"] / s.batch / reading.work
            row["share"] = result.shares(engine.name, lambda seconds: a_token * seconds[reading.name], "token_seconds")


def _compare_ours(row, engines, key, result):
    measure = SCENARIOS[key[0]].measure
    timed = [e for e in engines[1:] if result.samples.get(e.name)]
    row["ratios"] = {e.name: result.ratio(OURS, e.name, measure) for e in timed} if result.samples.get(OURS) else {}
    alike = [e.name for e in timed if e.dtype == key[1] and e.name in row["ratios"]]
    row["best"] = min(alike, default=None, key=lambda name: row["ratios"][name]["median"])
    row["targets"] = decoding.targets(*key)
    baseline = next((e.name for e in engines if f"{e.engine} {e.dtype}" == BASELINE), None)
    row["verdicts"] = decoding.verdicts(row["targets"], {
        "best rival": row["ratios"].get(row["best"]), BASELINE: row["ratios"].get(baseline), "share": row["share"]})


COLUMNS = "{:19} {:9} {:8} {:9} {:>13} {:>3} {:>11} {:>11} {:>7} {:>8}  {}"


def print_rows(rows):
    for row in rows:
        start = [row["variant"], row["precision"] or "-", row["scenario"], row["dtype"],
                 f"{row['batch']} x {row['prompt']} + {row['new']}", row["threads"]]
        if row["failure"]:
            print(COLUMNS.format(*start, "-", "-", "-", "-", f"no figures: {row['failure']}"), flush=True)
            continue
        rates = [f"{row[rate]['median']:.1f}" if row[rate] else "-"
                 for rate in ("prefill_tokens_per_second", "decode_tokens_per_second")]
        share = f"{row['share']['median']:.0%}" if row["share"] else "-"
        memory = f"{row['peak_mb']:.0f}" if row["peak_mb"] else "-"
        print(COLUMNS.format(*start, *rates, share, memory, remarks(row)), flush=True)


def remarks(row):
    """Ours against each rival, the targets, and how many samples were disturbed."""
    ours = [f"{ratio['median']:.2f} x {rival} ({ratio['q1']:.2f}..{ratio['q3']:.2f})"
            for rival, ratio in row["ratios"].items()]
    targets = [f"{name} {target:g}: {row['verdicts'][name]}" for name, target in row["targets"].items()]
    disturbed = [f"{row['dirty']} samples disturbed"] if row["dirty"] else []
    return "; ".join(ours + targets + disturbed)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(DEFAULT_SCENARIOS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=thread_counts())
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--python", nargs="+", default=[], metavar="RIVAL=PATH", help="the Python that has a rival")
    parser.add_argument("--models", metavar="DIR", help="keep the engines' model files here (about 6 GB for all)")
    parser.add_argument("--log", metavar="FILE", default=os.devnull, help="add to it what the engines print")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for each scenario, dtype, threads")
    parser.add_argument("--cap", type=float, default=30.0, help="seconds that a run of an engine may take")
    parser.add_argument("--quick", action="store_true", help="3 rounds within 20 seconds each")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    settings = vars(parser.parse_args(argv))
    pythons = dict(item.split("=", 1) for item in settings.pop("python"))
    if not set(pythons) <= set(RIVALS):
        parser.error(f"--python: expected RIVAL=PATH of {', '.join(RIVALS)}")
    if settings["quick"]:
        settings.update(rounds=3, budget=20.0)
    return settings, (settings.pop("models"), pythons, settings.pop("log")), settings.pop("save")


def main(argv=None):
    settings, (folder, *surroundings), save = parse(argv)
    print(one_line(describe()))
    print(COLUMNS.format("variant", "precision", "scenario", "dtype", "batch x in+out", "thr", "prefill t/s",
                         "decode t/s", "share", "peak MB", "ours is"))
    neighbours = Neighbours(patience=QUICK_PATIENCE) if settings["quick"] else Neighbours()
    rows, measured = [], []
    for threads in settings["threads"]:
        with use_threads(threads):
            measured += ceilings.measure(threads, neighbours=neighbours)
    with tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as place:
        models = Models(place, *surroundings)
        for key in itertools.product(settings["scenarios"], settings["dtypes"], settings["threads"]):
            found = measure(settings, models, key, neighbours)
            print_rows(found)
            rows += found
    results.finish(results.document("generate", settings, measured, rows), save)


if __name__ == "__main__":
    main()
