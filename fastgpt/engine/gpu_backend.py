"""The engine on a GPU: a step is started before the tokens of the one before are known, so that their copy costs nothing."""
from dataclasses import dataclass

import torch

from fastgpt import cuda, kernels
from fastgpt.autograd.tensors import MAX_HEAD_SIZE
from fastgpt.config import check_int
from fastgpt.cuda.sampling import MOST_VOCABULARY
from fastgpt.engine import gpu_device
from fastgpt.engine.gpu_runner import CACHE_DTYPES, GpuRunner
from fastgpt.engine.gpu_weights import GpuWeights
from fastgpt.extension import LARGEST_PAGE

CONTEXTS = 256  # full ones that the KV cache holds by default, where there is the memory
SHARE = 0.8  # of the free memory, at most


@dataclass
class UnderWay:
    """A step whose tokens were drawn on the device: tokens (R,) there, `wait` for them here; reported: (sequence, its row of
    logits) where log probabilities are wanted."""

    ready: list
    tokens: torch.Tensor
    wait: object
    reported: list


def too_large(config):
    """Why the kernels can't take a model of this config, or None."""
    if config.n_embd // config.n_head > MAX_HEAD_SIZE:
        return f"the kernels take heads of up to {MAX_HEAD_SIZE}, not {config.n_embd // config.n_head}"
    if config.vocab_size > MOST_VOCABULARY:
        return f"the kernels take vocabularies of up to {MOST_VOCABULARY}, not {config.vocab_size}"
    return None


class GpuBackend:
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

    def advance(self, llm, scheduler, endings, under_way):
        """Starts a step, then takes in the tokens of the one before: -> ([(sequence, its new token)], what is under way)."""
        made = []
        if under_way and any(s.request.params.penalises for s in scheduler.running):
            made, under_way = self._finish(llm, scheduler, endings, under_way), None  # what is drawn depends on them
        started = self._start(llm, scheduler, under_way)
        if under_way:
            made = self._finish(llm, scheduler, endings, under_way)
        return made, started

    def _start(self, llm, scheduler, under_way):
        with self.device.turn():
            return self._start_here(llm, scheduler, under_way)

    def _start_here(self, llm, scheduler, under_way):
        step = scheduler.plan()
        if step is None:
            return None
        logits = llm.runner.step(step, drawn=under_way and under_way.tokens)
        if not step.ready:
            return None
        ready, logits = scheduler.fork_ready(step.ready, logits, lambda counts: llm.runner.repeat(logits, counts))
        reported = [(s, row.clone()) for s, row in zip(ready, logits) if s.logprobs is not None]
        tokens = llm.draw(ready, logits)
        for number, sequence in enumerate(ready):
            sequence.await_token(number)
        return UnderWay(ready, tokens, self.device.download(tokens), reported)

    def _finish(self, llm, scheduler, endings, step):
        """Sequences that ended with the token before have drawn one too many."""
        tokens = step.wait()
        going_on = [(s, token) for s, token in zip(step.ready, tokens) if s.finish_reason is None]
        with self.device.turn():
            reported = [(s, row.cpu().numpy()) for s, row in step.reported if s.finish_reason is None]
        return llm.push(scheduler, endings, *(map(list, zip(*going_on)) if going_on else ([], [])), reported)
