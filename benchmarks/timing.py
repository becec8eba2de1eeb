"""The one timer: paired, interleaved, with a spread, and without a figure for what is wrong.

`compare` runs every contestant once a round, in rotating order, so that the machine's drift (clocks, other tenants)
meets all of them alike; a ratio is taken within each round, then its median. A contestant whose check fails is not
timed. It is a `Variant` here, or a `processes.Process` elsewhere: anything with `name`, `prepare()` and `sample()`.
"""
import statistics
import time
from dataclasses import dataclass, field

from benchmarks.neighbours import Neighbours

MIN_ROUNDS = 3  # below this a budget ends the run only when it is exceeded by far
WARM_UP_SECONDS = 0.05
# PyTorch's threads spin for some milliseconds after its op. To a run as long as this they make no difference.
SETTLING_SECONDS = 0.4


@dataclass
class Sample:
    seconds: float  # of one run
    cpu_seconds: float = 0.0  # that the contestant used while it was taken
    values: dict = field(default_factory=dict)  # what else the contestant measured
    dirty: bool = False  # others used the processors meanwhile


class Failure(Exception):
    """A contestant gave a wrong result, died or took too long: its row says why and has no figures."""


class TooSlow(Failure):
    """It took longer than it may."""


class Variant:
    """A contestant in this process.

    run() is one step; setup() comes before each sample, untimed; check() raises Failure or AssertionError when the
    results are wrong. A sample repeats a short run until about sample_seconds have passed. known_seconds: what a run
    takes, where that is known to be so long that a run to warm up would be wasted.
    """

    def __init__(self, name, run, *, setup=None, check=None, sample_seconds=0.02, known_seconds=None):
        self.name, self.run, self.setup, self.check = name, run, setup, check
        self.sample_seconds, self.known_seconds = sample_seconds, known_seconds
        self.repeats, self.settles = 1, False

    def prepare(self):
        """The check, then runs until caches and allocators are warm, which also tell how many fill a sample."""
        if self.check is not None:
            self.check()
        if self.known_seconds is not None:
            return
        start, runs, fastest = time.perf_counter(), 0, float("inf")
        while runs < 2 or time.perf_counter() - start < min(WARM_UP_SECONDS, self.sample_seconds):
            if self.setup is not None:
                self.setup()
            begin = time.perf_counter()
            self.run()
            fastest, runs = min(fastest, time.perf_counter() - begin), runs + 1
            if fastest > 10 * self.sample_seconds:
                break  # so long that the first run's share of warming up is small
        self.repeats = max(1, int(self.sample_seconds / max(fastest, 1e-9)))
        self.settles = fastest < SETTLING_SECONDS

    def sample(self, evict=None):
        if self.setup is not None:
            self.setup()
        if evict is not None:
            evict()
        elif self.settles:
            self.run()  # so that what the contestant before left behind (caches, spinning threads) is not measured
        repeats = 1 if evict is not None else self.repeats
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(repeats):
            self.run()
        seconds = time.perf_counter() - start
        return Sample(seconds / repeats, time.process_time() - cpu)


def spread(values):
    """{"median", "q1", "q3", "count"} of some numbers."""
    values = list(values)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3, "count": len(values)}


def rate(seconds, amount):
    """A spread of seconds as one of `amount` a second."""
    return {"median": amount / seconds["median"], "q1": amount / seconds["q3"], "q3": amount / seconds["q1"],
            "count": seconds["count"]}


class Comparison:
    """What `compare` saw: samples[name][round], and failures[name], the reason why a contestant has no samples."""

    def __init__(self, names):
        self.samples, self.failures = {name: [] for name in names}, {}

    def fail(self, name, error):
        self.failures[name] = f"{type(error).__name__}: {error}" if not isinstance(error, Failure) else str(error)
        self.samples.pop(name, None)

    def timing(self, name, value=None):
        """The spread of a contestant's seconds, or of another value that it measured; None when it failed."""
        if not self.samples.get(name):
            return None
        return spread(_value(s, value) for (s,) in self._clean_rounds(name))

    def ratio(self, name, rival, value=None):
        """How many times faster than `rival` (round by round) `name` is; None when one of them failed."""
        if not (self.samples.get(name) and self.samples.get(rival)):
            return None
        return spread(_value(r, value) / _value(s, value) for s, r in self._clean_rounds(name, rival))

    def shares(self, name, ideal, value=None):
        """The spread of ideal(seconds: name -> those of the round) / the contestant's own seconds, or another value."""
        names = list(self.samples)
        if not self.samples.get(name):
            return None
        rounds = [dict(zip(names, samples)) for samples in self._clean_rounds(*names)]
        return spread(ideal({n: s.seconds for n, s in r.items()}) / _value(r[name], value) for r in rounds)

    def dirty(self, name):
        return sum(sample.dirty for sample in self.samples.get(name, ()))

    def _clean_rounds(self, *names):
        """The rounds in which none of these was disturbed; all rounds when that leaves fewer than MIN_ROUNDS."""
        rounds = list(zip(*(self.samples[name] for name in names)))
        clean = [r for r in rounds if not any(sample.dirty for sample in r)]
        return clean if len(clean) >= MIN_ROUNDS else rounds


def _value(sample, name):
    return sample.seconds if name is None else sample.values[name]


def compare(contestants, *, rounds=9, budget=None, evict=None, neighbours=None):
    """Times contestants against each other: -> Comparison.

    budget: seconds after which no new round begins, once there are MIN_ROUNDS (or one, if a round alone takes as long).
    evict: called before each sample to empty the caches, for what is cold in use; a sample is then a single run.
    """
    result = Comparison([c.name for c in contestants])
    neighbours = neighbours or Neighbours()
    alive = [c for c in contestants if _attempt(result, c, c.prepare)]
    start = time.perf_counter()
    for i in range(rounds):
        elapsed = time.perf_counter() - start
        if budget is not None and elapsed > budget and (i >= MIN_ROUNDS or elapsed > budget * i):
            break
        for contestant in _rotated(alive, i):
            neighbours.wait_until_quiet()
            _attempt(result, contestant, lambda c=contestant: _take(result, c, evict, neighbours))
        alive = [c for c in alive if c.name not in result.failures]
    neighbours.close()
    return result


def _rotated(items, by):
    by = by % len(items) if items else 0
    return items[by:] + items[:by]


def _take(result, contestant, evict, neighbours):
    sample = contestant.sample(evict)
    result.samples[contestant.name].append(sample)
    neighbours.add(sample)


def _attempt(result, contestant, action):
    """Whether the action went well; if not, the contestant is out and the result says why."""
    try:
        action()
    except (Failure, AssertionError, RuntimeError, MemoryError, ImportError) as error:
        result.fail(contestant.name, error)
    return contestant.name not in result.failures
