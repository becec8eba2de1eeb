"""One engine at one scenario, in a process of its own. Started by bench_generate:

python -m benchmarks.generation NAME PRECISION THREADS SOURCE FOLDER BATCH PROMPT NEW
python -m benchmarks.generation --make NAME PRECISION SOURCE FOLDER

THREADS: how many, or "cuda" for an NVIDIA GPU. The second writes the engine's files into FOLDER. Standard library alone,
but for the engine itself.
"""
import itertools
import json
import random
import sys
import time
from pathlib import Path

from benchmarks.peers import ENGINES
from benchmarks.processes import Parent, memory_mb, reset_peak

CHECKED_TOKENS = 16  # of each prompt at least, also where the scenario wants a single one


def random_prompts(vocab, batch, length, seed):
    """The same for every engine; another seed each round, so that no engine has them in a cache of prefixes."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(batch)]


def timed(engine, prompts, new):
    """-> (the new ids, the seconds until every prompt had its first token, and those of each token after that)."""
    start = time.perf_counter()
    ids, times = engine.generate(prompts, new)
    if any([len(row) for row in rows] != [new] * len(prompts) for rows in (ids, times)):
        raise ValueError(f"gave {[len(row) for row in ids]} ids at {[len(row) for row in times]} times, expected {new}")
    first = max(row[0] for row in times)
    later = sorted(t for row in times for t in row if t > first)  # a prompt may be ahead of the others
    return ids, {"first_seconds": first - start, "token_seconds": (later[-1] - first) / len(later) if later else None}


def serve(parent, name, precision, threads, source, folder, *shape):
    batch, length, new = map(int, shape)
    vocab = json.loads(Path(source, "config.json").read_text())["vocab_size"]
    engine = ENGINES[name].adapter().Engine(source, folder, precision, int(threads) if threads.isdigit() else threads)
    load_mb = memory_mb()
    reset_peak()
    ids, _ = timed(engine, random_prompts(vocab, batch, length, 0), max(new, CHECKED_TOKENS))
    seeds = itertools.count(1)
    start = time.perf_counter()
    timed(engine, random_prompts(vocab, batch, length, next(seeds)), new)
    warm_seconds = time.perf_counter() - start

    def step():
        _, values = timed(engine, random_prompts(vocab, batch, length, next(seeds)), new)
        return {**values, "peak_mb": memory_mb()}

    parent.serve(step, ids=ids, warm_seconds=warm_seconds, load_mb=load_mb, version=engine.version,
                 weight_bytes=int(engine.weight_bytes))


def make(parent, name, precision, source, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    ENGINES[name].adapter().make(source, folder, precision)
    parent.serve(dict)


def reason(error, package):
    """One line. package: what pip installs the engine by."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install {package}"
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def main(argv):
    parent, making = Parent(), argv[0] == "--make"
    try:
        make(parent, *argv[1:]) if making else serve(parent, *argv)
    except Exception as error:  # whatever an engine raises is why it has no figures
        parent.refuse(reason(error, ENGINES[argv[making]].package))
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
