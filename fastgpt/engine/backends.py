"""What the engine asks of a device: how weights, pages and steps are made there. This is the CPU's; gpu_backend.py has a GPU's."""
import contextlib
import os
import sys

import numpy as np

from fastgpt import extension
from fastgpt.config import check_int
from fastgpt.engine.memory import address
from fastgpt.engine.runner import CpuRunner
from fastgpt.engine.weights import PackedWeights
from fastgpt.extension import _C, CACHE_DTYPES, KEY_LANES, LARGEST_PAGE

CONTEXTS = 16  # full ones that the KV cache holds by default


def backend_of(device, threads, shared=False):
    """device: as `fastgpt.LLM` has it. shared: of a model's weights on a GPU, as `GpuWeights` has it."""
    if device == "cpu":
        return CpuBackend(threads)
    if not isinstance(device, str) or device.partition(":")[0] != "cuda":
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:<number>", got {device!r}')
    if threads is not None:
        raise ValueError("threads are those of the CPU's steps; a GPU has none to be set")
    from fastgpt.engine.gpu_backend import GpuBackend
    return GpuBackend(device, shared)


class NotFinite(ValueError):
    """Logits that are no distribution to draw from."""


def forced():
    """The backend that was asked for, by FASTGPT_BACKEND or ops.backend(), or "auto"."""
    ops = sys.modules.get("fastgpt.ops")  # which imports torch
    return os.environ.get("FASTGPT_BACKEND", "auto") if ops is None else ops.forced()


def refuse_other_kernels(backend):
    """Raises where a backend of the ops was asked for on which this one of the engine's does not run."""
    if forced() not in ("auto", *backend.kernels):
        raise RuntimeError(f"fastgpt.LLM: the backend {forced()!r} was asked for, by FASTGPT_BACKEND or ops.backend(), but here the "
                           f"decode engine runs on {' and '.join(backend.kernels)} alone; GPT.generate runs on the reference too")


class CpuBackend:
    kernels = ("cpp",)
    out_of_memory = (MemoryError, OSError)

    def __init__(self, threads):
        self.threads = None if threads is None else check_int("threads", threads, 1, 1024)

    def page_size(self, wanted):
        wanted = check_int("page_size", wanted, KEY_LANES, LARGEST_PAGE)
        if wanted % KEY_LANES:
            raise ValueError(f"page_size must be a multiple of {KEY_LANES}, got {wanted}")
        return wanted

    def weights(self, config, tensors, dtype):
        with _threads(self.threads):
            return PackedWeights(config, tensors, dtype or "float32")

    def cache_dtype(self, weights, wanted):
        chosen = wanted or ("float32" if weights.dtype == "float32" else "bfloat16")
        if chosen not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {wanted!r}")
        return chosen

    def cache_tokens(self, weights, cache_dtype):
        """How many tokens the KV cache holds where nobody says."""
        return CONTEXTS * weights.config.block_size

    def runner(self, weights, num_pages, page_size, cache_dtype):
        return CpuRunner(weights, num_pages, page_size, cache_dtype, self.threads)

    def warm_up(self, llm, sequences):
        """Nothing is made late here."""

    def advance(self, llm, scheduler, endings, under_way):
        """A step of a scheduler: -> ([(sequence, its new token)], what is under way: never anything here)."""
        step = scheduler.plan()
        logits = llm.runner.step(step)
        if not step.ready:
            return [], None
        ready, logits = scheduler.fork_ready(step.ready, logits, lambda counts: np.repeat(logits, counts, axis=0))
        reported = [(i, s, logits[i].copy()) for i, s in enumerate(ready) if s.logprobs is not None]
        tokens = llm.choose(ready, logits)
        scheduler.drew(ready)
        made = llm.push(scheduler, endings, ready, tokens)
        for i, sequence, row in reported:
            sequence.logprobs.append(log_probabilities(row, tokens[i], sequence.request.params.logprobs))
        return made, None


def choose(logits, known, ready):
    """The next token of each sequence: logits (R, V), which are overwritten and of which the first `known` ids count, -> R
    ids, -1 where there is no distribution."""
    tokens = np.empty(len(ready), np.int32)
    _C.sample(address(logits), logits.shape[1], known, [s.draw() for s in ready], address(tokens))
    return tokens.tolist()


def log_probabilities(logits, chosen, count):
    """{token id: log probability} of the `count` likeliest and of the chosen one."""
    logits = logits.astype(np.float64)
    logs = logits - logits.max()
    logs -= np.log(np.exp(logs).sum())
    likeliest = np.argpartition(-logs, min(count, len(logs) - 1))[:count]
    ids = dict.fromkeys([*likeliest[np.argsort(-logs[likeliest], kind="stable")].tolist(), chosen])
    return {i: float(logs[i]) for i in ids}


@contextlib.contextmanager
def _threads(count):
    """Within this context the kernels have so many threads; None leaves them."""
    before = extension.get_num_threads()
    if count is not None:
        extension.set_num_threads(count)
    try:
        yield
    finally:
        if extension.get_num_threads() != before:
            extension.set_num_threads(before)
