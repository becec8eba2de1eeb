"""The engine on a GPU: a step is started before the tokens of the one before are known, so that their copy costs nothing."""
import contextlib
import itertools
from dataclasses import dataclass

import numpy as np
import torch

from fastgpt import cuda, kernels
from fastgpt.autograd.tensors import MAX_HEAD_SIZE
from fastgpt.config import check_int
from fastgpt.cuda.paged import MOST_DECODE_ROWS
from fastgpt.cuda.sampling import MOST_VOCABULARY, Draws
from fastgpt.engine import gpu_device
from fastgpt.engine.backends import NotFinite
from fastgpt.engine.gpu_runner import CACHE_DTYPES, GpuRunner
from fastgpt.engine.gpu_weights import GpuWeights
from fastgpt.extension import LARGEST_PAGE
from fastgpt.sampling import SamplingParams

CONTEXTS = 256  # full ones that the KV cache holds by default, where there is the memory
SHARE = 0.8  # of the free memory, at most


@dataclass
class UnderWay:
    """A step whose tokens were drawn on the device: tokens (R,) there, drawn by `draws`; `wait` for them here, and for the log
    probabilities of the sequences of which `rows` has the numbers: the `count` likeliest."""

    ready: list
    tokens: torch.Tensor
    draws: Draws
    wait: object
    rows: np.ndarray
    count: int


def too_large(config):
    """Why the kernels can't take a model of this config, or None."""
    if config.n_embd // config.n_head > MAX_HEAD_SIZE:
        return f"the kernels take heads of up to {MAX_HEAD_SIZE}, not {config.n_embd // config.n_head}"
    if config.vocab_size > MOST_VOCABULARY:
        return f"the kernels take vocabularies of up to {MOST_VOCABULARY}, not {config.vocab_size}"
    return None


class GpuBackend:
    kernels = ("triton", "cuda")
    out_of_memory = (torch.OutOfMemoryError,)

    def __init__(self, name, shared=False):
        self.shared = shared
        self.device = gpu_device.CudaDevice(name)
        for missing in (kernels.missing, cuda.missing):
            reason = missing(self.device.torch.index)
            if reason:
                raise RuntimeError(f"device {name!r} was asked for, but {reason}")

    def page_size(self, wanted):
        return check_int("page_size", wanted, 1, LARGEST_PAGE)

    def weights(self, config, tensors, dtype):
        refusal = too_large(config)
        if refusal:
            raise ValueError(f"device \"cuda\": {refusal}")
        with self.device.turn():  # what the engine's stream uses is given back to it alone
            return GpuWeights(config, tensors, dtype, self.device.torch, self.shared)

    def cache_dtype(self, weights, wanted):
        chosen = wanted or str(weights.compute).removeprefix("torch.")
        if chosen not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {wanted!r}")
        return chosen

    def cache_tokens(self, weights, cache_dtype):
        room = int(SHARE * self.device.free_memory()) // GpuRunner.bytes_of_token(weights.config, cache_dtype)
        return max(weights.config.block_size, min(CONTEXTS * weights.config.block_size, room))

    def runner(self, weights, num_pages, page_size, cache_dtype):
        with self.device.turn():
            return GpuRunner(weights, num_pages, page_size, cache_dtype, self.device)

    def warm_up(self, llm, sequences):
        """Captures the graphs of batches of up to so many sequences, as far as each can have a page, and runs prompts of a whole
        step and of a part of one, so that Triton has compiled what these need."""
        pages = llm.free_pages
        llm.runner.capture(min(sequences, pages))
        longest = min(llm.config.block_size, llm.max_step_tokens, pages * llm.runner.page_size)
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, seed=0)
        for length in {longest, min(longest, MOST_DECODE_ROWS + 1)}:
            with contextlib.suppress(NotFinite):  # such a prompt's logits, or all of the model's: whoever asks will be told
                llm.generate([[0] * length], params)

    def advance(self, llm, scheduler, endings, under_way):
        """Starts a step, then takes in the tokens of the one before: -> ([(sequence, its new token)], what is under way)."""
        started = self._start(llm, scheduler, under_way)
        made = self._finish(llm, scheduler, endings, under_way) if under_way else []
        return made, started

    def _start(self, llm, scheduler, under_way):
        with llm.runner.alone():
            return self._start_here(llm, scheduler, under_way)

    def _start_here(self, llm, scheduler, under_way):
        step = scheduler.plan()
        if step is None:
            return None
        logits = llm.runner.step(step, drawn=under_way and under_way.tokens)
        if not step.ready:
            return None
        ready, logits = scheduler.fork_ready(step.ready, logits, lambda counts: llm.runner.repeat(logits, counts))
        again = under_way and under_way.ready == ready and not scheduler.penalises
        if again:
            draws = llm.runner.next_draws(under_way.draws)
        else:
            draws = llm.runner.draws(ready, scheduler.drawn(ready), scheduler.drawn_at(ready), under_way and under_way.tokens)
        rows = np.array([i for i, s in enumerate(ready) if s.logprobs is not None], np.int64)
        if len(rows):
            chosen = slice(None) if len(rows) == len(ready) else self.device.upload(rows)
            logs = llm.runner.log_probabilities(logits[chosen])  # what is drawn from is overwritten
        found = tokens = llm.runner.draw(logits, draws, llm.known_ids())
        count = 0
        if len(rows):
            count = min(max(ready[i].request.params.logprobs for i in rows), llm.config.vocab_size)
            found = llm.runner.report(tokens, tokens[chosen], logs, count)
        scheduler.drew(ready)
        return UnderWay(ready, tokens, draws, self.device.download(found), rows, count)

    @staticmethod
    def _finish(llm, scheduler, endings, step):
        """Sequences that ended with the token before have drawn one too many."""
        found = step.wait()
        tokens, going_on = found[:len(step.ready)].tolist(), [s.finish_reason is None for s in step.ready]
        if len(step.rows):
            _tell(step, tokens, found[len(tokens):])
        if all(going_on):
            return llm.push(scheduler, endings, step.ready, tokens)
        return llm.push(scheduler, endings, *(list(itertools.compress(column, going_on)) for column in (step.ready, tokens)))


def _tell(step, tokens, found):
    """Gives sequences the log probabilities that `GpuRunner.report` has found."""
    L = len(step.rows)
    ids, values = found[:L * step.count].reshape(L, -1), found[L * step.count:].view(np.float32).reshape(L, -1)
    for row, likeliest, logs in zip(step.rows.tolist(), ids.tolist(), values.tolist()):
        sequence = step.ready[row]
        if sequence.finish_reason is None:
            wanted = sequence.request.params.logprobs
            sequence.logprobs.append({**dict(zip(likeliest[:wanted], logs)), tokens[row]: logs[-1]})
