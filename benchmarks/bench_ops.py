"""Every op against PyTorch's own at GPT-2's shapes: python -m benchmarks.bench_ops [--quick] [--save ops]

Ours, PyTorch's and two ceilings (arithmetic, and reading from where the data lives) take turns in one process. A row
has figures only after our values and gradients have passed the tests' accuracy rule. The last line is one JSON
document.
"""
import argparse
import time
from dataclasses import dataclass

import torch

from benchmarks import cases, ceilings, memory, results
from benchmarks.accuracy import check_results
from benchmarks.machine import describe, one_line
from benchmarks.neighbours import QUICK_PATIENCE, Neighbours
from benchmarks.threads import thread_counts, use_threads
from benchmarks.timing import Variant, compare
from fastgpt import ops
from fastgpt.allocator import keep_freed_memory

OURS, PYTORCH = "fastgpt", "pytorch"
COLUMNS = "{:14} {:18} {:25} {:8} {:>3} {:>9} {:>9} {:>19} {:>8} {:>6} {:>27}  {}"
HEADER = COLUMNS.format("op", "what", "shape", "dtype", "thr", "ours ms", "torch ms", "ratio (quartiles)", "GFLOP/s",
                        "GB/s", "share of its ceiling", "target")


@dataclass(frozen=True)
class Effort:
    """How long to measure. budget: seconds a comparison; cap: of the longest run of PyTorch's that is waited for."""

    rounds: int = 9
    budget: float = 3.0
    cap: float = 20.0
    cold: bool = False


class Subject:
    """A case in one dtype: its inputs, and what PyTorch and the float64 truth make of them, computed once."""

    def __init__(self, case, dtype):
        self.case, self.dtype = case, dtype
        self.inputs = case.make(cases.DTYPES[dtype], torch.Generator().manual_seed(0))
        wide = {name: t.double() if t.is_floating_point() else t for name, t in self.inputs.items()}
        self.truth = cases.step(case, case.truth, wide)()
        run = cases.step(case, case.pytorch, self.inputs)
        start = time.perf_counter()
        self.pytorch = run()
        self.pytorch_cpu_seconds = (time.perf_counter() - start) * torch.get_num_threads()
        self.traffic = cases.traffic(case, self.inputs, self.pytorch)
        self.footprint = sum(t.nbytes for t in (*self.inputs.values(), *self.pytorch))

    def floating(self):
        """The tensors by which an implementation is chosen: not the targets of a loss."""
        return [t for t in self.inputs.values() if t.is_floating_point()]

    def ours(self):
        run = cases.step(self.case, self.case.ours, self.inputs)
        names = cases.result_names(self.case, self.inputs, self.truth)
        return Variant(OURS, run, check=lambda: check_results(names, run(), self.truth, self.pytorch))

    def theirs(self, threads, cap):
        """PyTorch's contestant, or None when a run of it is expected to take more than cap seconds."""
        expected = self.pytorch_cpu_seconds / threads
        if expected > cap:
            return None
        return Variant(PYTORCH, cases.step(self.case, self.case.pytorch, self.inputs),
                       known_seconds=expected if expected > 1.0 else None)


def measure(subject, threads, effort, neighbours):
    """One row: ours, PyTorch's and the ceilings in turns."""
    case = subject.case
    home = "memory" if effort.cold else ceilings.home(subject.footprint, threads)
    limits = [ceilings.reading(home, threads)]
    if case.flops:
        limits.append(ceilings.arithmetic(ceilings.arithmetic_kind(subject.dtype), threads))
    limits = [limit for limit in limits if limit]
    theirs = subject.theirs(threads, effort.cap)
    contestants = [subject.ours(), *([theirs] if theirs else []), *(limit.variant() for limit in limits)]
    result = compare(contestants, rounds=effort.rounds, budget=effort.budget, neighbours=neighbours,
                     evict=ceilings.evict if effort.cold else None)
    if theirs is None:
        result.failures[PYTORCH] = f"a run takes more than the cap of {effort.cap:g} s"
    return _row(subject, threads, limits, result)


def _row(subject, threads, limits, result):
    case = subject.case
    ours = result.timing(OURS)
    row = {"op": case.op, "what": case.what, "shape": case.shape, "dtype": subject.dtype, "threads": threads,
           "implementation": ops.resolve(case.op, *subject.floating())[0],
           "seconds": ours, "pytorch_seconds": result.timing(PYTORCH), "ratio": result.ratio(OURS, PYTORCH),
           "flops": case.flops, "bytes": subject.traffic, "gflops": None, "gbs": None, "share": None, "ceiling": None,
           "dirty": result.dirty(OURS) + result.dirty(PYTORCH), "failures": result.failures,
           "targets": case.targets[subject.dtype]}
    if ours:
        row["gflops"] = case.flops / ours["median"] / 1e9 or None
        row["gbs"] = subject.traffic / ours["median"] / 1e9
        if limits:
            row["ceiling"], row["share"] = _share(case.flops, subject.traffic, limits, result)
    return row


def _share(flops, size, limits, result):
    """Of the ceiling that binds (that an ideal run waits for): its name, and the spread of ideal / measured time."""
    works = {limit.name: (flops if limit.unit == "GFLOP/s" else size) / limit.work for limit in limits}
    slowest = max(works, key=lambda name: works[name] * result.timing(name)["median"])
    return slowest, result.shares(OURS, lambda seconds: works[slowest] * seconds[slowest])


def add_memory(row, case, sizes):
    """The peak memory of ours and PyTorch's, each measured in a process of its own."""
    peaks = {name: memory.peak_mb(case, name, row["dtype"], sizes) for name in (OURS, PYTORCH)}
    row["peak_mb"] = peaks
    numbers = all(isinstance(peak, float) for peak in peaks.values())
    row["memory"] = peaks[OURS] / peaks[PYTORCH] if numbers and peaks[PYTORCH] > 0 else None


def judge(row):
    """Target -> "yes", "no", "close" (the median misses it, its better quartile does not), or "unknown"."""
    verdicts = {}
    for name, target in row["targets"].items():
        value = row.get(name)
        if value is None:
            verdicts[name] = "unknown"
        elif name == "memory":
            verdicts[name] = "yes" if value <= target else "no"
        else:
            verdicts[name] = "yes" if value["median"] >= target else "close" if value["q3"] >= target else "no"
    return verdicts


def print_row(row):
    if OURS in row["failures"]:
        print(f"{row['op']:14} {row['what']:18} {row['shape']:25} {row['dtype']:8} {row['threads']:3} "
              f"WRONG: {row['failures'][OURS]}", flush=True)
        return
    ratio, share = row["ratio"], row["share"]
    targets = [f"{name} {'<=' if name == 'memory' else '>='} {row['targets'][name]:.3g}: {verdict}"
               for name, verdict in row["met"].items()]
    print(COLUMNS.format(
        row["op"], row["what"], row["shape"], row["dtype"].replace("float", "f"), row["threads"], _ms(row["seconds"]),
        _ms(row["pytorch_seconds"]), f"{ratio['median']:.2f} ({ratio['q1']:.2f}..{ratio['q3']:.2f})" if ratio else "-",
        f"{row['gflops']:.1f}" if row["gflops"] else "-", f"{row['gbs']:.1f}",
        f"{share['median']:.0%} {row['ceiling']}" if share else "-",
        "; ".join(targets) + (f" [{row['implementation']}]" if row["implementation"] != "cpp" else "")
        + (f" [{row['dirty']} samples disturbed]" if row["dirty"] else "")), flush=True)


def _ms(seconds):
    return f"{seconds['median'] * 1e3:.3f}" if seconds else "-"


def run(settings):
    """Measures what the settings name: -> (the ceilings' rows, the ops' rows)."""
    quick = settings["quick"]
    effort = Effort(3, 1.0, 2.0, settings["cold"]) if quick else Effort(cold=settings["cold"])
    neighbours = Neighbours(patience=QUICK_PATIENCE) if quick else Neighbours()
    rows, tops = [], []
    for threads in settings["threads"]:
        with use_threads(threads):
            tops += ceilings.measure(threads, effort.rounds, neighbours)
    print(HEADER)
    for case in cases.all_cases(cases.SIZES[settings["sizes"]]):
        for dtype in settings["dtypes"]:
            if case.op in settings["ops"] and dtype in case.targets:
                rows += _rows(case, dtype, settings, effort, neighbours)
    return tops, rows


def _rows(case, dtype, settings, effort, neighbours):
    rows = []
    with use_threads(max(settings["threads"])):
        subject = Subject(case, dtype)
    for threads in settings["threads"]:
        with use_threads(threads):
            row = measure(subject, threads, effort, neighbours)
        if "memory" in row["targets"]:
            add_memory(row, case, settings["sizes"])
        row["met"] = judge(row)
        print_row(row)
        rows.append(row)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=ops.OPS, default=list(ops.OPS))
    parser.add_argument("--dtypes", nargs="+", choices=cases.DTYPES, default=list(cases.DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=thread_counts())
    parser.add_argument("--quick", action="store_true", help="3 rounds, and no waiting for slow rivals")
    parser.add_argument("--cold", action="store_true", help="empty the caches before each sample")
    parser.add_argument("--sizes", choices=cases.SIZES, default="gpt2")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    settings = vars(parser.parse_args(argv))
    save = settings.pop("save")
    keep_freed_memory()  # for PyTorch's results and ours alike, as in `fastgpt train`
    print(one_line(describe()))
    tops, rows = run(settings)
    results.finish(results.document("ops", settings, tops, rows), save)


if __name__ == "__main__":
    main()
