"""What the parts of bench_gpu share: the timer, contestants in this process, the GPU's ceilings, and the rows."""
import importlib
from functools import partial

import torch

from benchmarks import timing
from benchmarks.neighbours import Neighbours

OURS, PYTORCH, COMPILED, FLASH, LIGER = "fastgpt", "pytorch", "pytorch, compiled", "flash-attn", "liger"
DTYPE = torch.bfloat16
FLUSHED = 256 << 20  # bytes written before each call: more than any L2 cache holds
DELAY = 2_000_000  # clocks, about 1 ms: the host has queued a call before the GPU gets to it, and only the GPU is timed
WARM_UPS = 3
COLUMNS = "{:24} {:19} {:19} {:>9} {:>19}  {}"


class CudaTimer:
    """Times calls on the GPU by events, each with cold L2 caches. rounds: how often each contestant takes its turn."""

    def __init__(self, rounds):
        self.rounds = rounds
        self.buffer = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")

    def warm_up(self, run):
        for _ in range(WARM_UPS):
            run()
        torch.cuda.synchronize()

    def seconds(self, run):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(DELAY)
        self.buffer.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def allocated(self):
        return torch.cuda.memory_allocated()

    def peak(self, run):
        """The most bytes of tensors during a call; `allocated`: those of now."""
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def guarded(run):
    """run(), whose errors, of whatever library, are a timing.Failure of one line."""
    try:
        return run()
    except Exception as error:
        raise timing.Failure(f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}") from error


def imported(module):
    return guarded(partial(importlib.import_module, module))


class Contestant:
    """What `timing.compare` runs, timed by `timer`. setup() comes before each timed call."""

    def __init__(self, name, run, timer, setup=None):
        self.name, self.run, self.timer, self.setup = name, run, timer, setup

    def prepare(self):
        guarded(partial(self.timer.warm_up, self.run))

    def sample(self, evict=None):
        if self.setup is not None:
            guarded(self.setup)
        return timing.Sample(guarded(partial(self.timer.seconds, self.run)))


def compare(entrants, timer, **options):
    return timing.compare(entrants, **{"rounds": timer.rounds, **options}, neighbours=Neighbours(busy=lambda: None))


class Ceiling(Contestant):
    """A call that does `work`, in the unit of its rate, as fast as the GPU can."""

    def __init__(self, name, run, timer, work):
        super().__init__(name, run, timer)
        self.work = work


def ceiling_calls(timer, device="cuda", copied=1 << 30, multiplied=8192):
    """Bytes (read and written) of a copy, and FLOPs of a product of square matrices in bfloat16."""
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, multiplied, multiplied, dtype=DTYPE, device=device)
    return [Ceiling("copy", lambda: target.copy_(source), timer, 2 * copied),
            Ceiling("matmul", lambda: torch.matmul(a, b), timer, 2 * multiplied ** 3)]


def ceilings(timer, *sizes):
    """Rows of what the GPU does at best. sizes: as `ceiling_calls` has them, with the device."""
    calls = ceiling_calls(timer, *sizes)
    result = compare(calls, timer)
    return [{"ceiling": call.name, "seconds": result.timing(call.name),
             "rate": timing.rate(result.timing(call.name), call.work)} for call in calls]


def row(known, name, result, failure, tops):
    """tops: `ceilings`' rows. share: the least time for the work at the ceiling that binds, over the measured one. ratio: how
    many times faster ours is than this contestant."""
    seconds = result.timing(name)
    found = {**known, "contestant": name, "seconds": seconds, "ceiling": None, "share": None,
             "ratio": None if name == OURS else result.ratio(OURS, name), "failure": failure}
    if seconds and tops:
        ideal = {top["ceiling"]: known["flops" if top["ceiling"] == "matmul" else "bytes"] / top["rate"]["median"]
                 for top in tops}
        found["ceiling"] = max(ideal, key=ideal.get)
        found["share"] = timing.rate(seconds, ideal[found["ceiling"]])
    return found


def print_row(row):
    figures, ratio = ("-", "-", row["failure"]), row["ratio"]
    if row["seconds"]:
        ratio = f"{ratio['median']:.2f} ({ratio['q1']:.2f}..{ratio['q3']:.2f})" if ratio else "-"
        figures = f"{row['seconds']['median'] * 1e6:.1f}", ratio, ", ".join(_notes(row))
    print(COLUMNS.format(row["spec"], row["what"], row["contestant"], *figures), flush=True)


def _notes(row):
    if row.get("tokens_per_second"):
        yield f"{row['tokens_per_second']['median']:.0f} tokens/s"
    if row.get("peak_mb"):
        yield f"{row['peak_mb']:.0f} MB"
    if row.get("share"):
        yield f"{row['share']['median']:.0%} of {row['ceiling']}"
