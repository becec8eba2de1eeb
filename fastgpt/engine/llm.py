"""`fastgpt.LLM`: text or token ids in, text, token ids and log probabilities out, on the decode engine."""
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastgpt import extension
from fastgpt.config import check_int
from fastgpt.engine import weights as weights_module
from fastgpt.engine.pages import PageAllocator
from fastgpt.engine.runner import CACHE_DTYPES, LANES, CpuRunner
from fastgpt.engine.scheduler import Reservations, Scheduler
from fastgpt.engine.sequence import Ending, Request
from fastgpt.extension import _C
from fastgpt.sampling import SamplingParams

PAGE_SIZE = 64
STEP_TOKENS = 512  # of prompts, in one step
CONTEXTS = 16  # full ones that the KV cache holds by default
LARGEST_PAGE = 1024


@dataclass
class CompletionOutput:
    """One sample. finish_reason: "stop" or "length"; stop_reason: the stop string or id that ended it. A stop string and
    what follows it are not in `text`. logprobs: for each token {id: log probability}, when asked for."""

    index: int
    text: str
    token_ids: list
    finish_reason: str | None
    stop_reason: str | int | None = None
    logprobs: list | None = None


@dataclass
class RequestOutput:
    prompt: str | None
    prompt_token_ids: list
    outputs: list = field(default_factory=list)


@dataclass
class StreamOutput:
    """A new token: of which prompt and which of its samples, and the text that has become certain with it."""

    index: int
    sample: int
    token_id: int
    text: str
    finish_reason: str | None


class LLM:
    """A model that generates on the decode engine.

    model: the path of a directory as transformers or `GPT.save_pretrained` writes it, of anything else that
    `GPT.from_pretrained` takes, or a `fastgpt.GPT`, whose weights are copied.
    dtype: of the weights: "float32", "bfloat16", "int8" (a scale for each output) or "int4" (a scale for each 32 weights).
    threads: of this engine's steps; None for `fastgpt.get_num_threads()`.
    kv_cache_tokens: how many tokens' keys and values fit, by default those of 16 full contexts; memory is taken
    as it is used. page_size: tokens of a page, a multiple of 16. kv_cache_dtype: "float32", "bfloat16" or "int8"; by
    default float32 for float32 weights, else bfloat16.
    tokenizer: a `fastgpt.Tokenizer` or a path; by default the directory's own, if it has one.

    The logits of a token have the same bits whatever else runs, however its prompt was cut, whichever pages it got and on
    any number of threads. Safe to call from several threads; their steps take turns.
    """

    def __init__(self, model, dtype="float32", threads=None, kv_cache_tokens=None, page_size=None, kv_cache_dtype=None,
                 tokenizer=None, max_step_tokens=STEP_TOKENS):
        self._lock = threading.Lock()
        self.max_step_tokens = check_int("max_step_tokens", max_step_tokens, 1)
        threads = None if threads is None else check_int("threads", threads, 1, 1024)
        page_size = check_int("page_size", PAGE_SIZE if page_size is None else page_size, LANES, LARGEST_PAGE)
        if page_size % LANES:
            raise ValueError(f"page_size must be a multiple of {LANES}, got {page_size}")
        cache_dtype = kv_cache_dtype or ("float32" if dtype == "float32" else "bfloat16")
        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {kv_cache_dtype!r}")
        with _threads(threads):
            packed = weights_module.PackedWeights(*_open(model), dtype)
        self.config, self.dtype, self.kv_cache_dtype = packed.config, dtype, cache_dtype
        tokens = CONTEXTS * self.config.block_size if kv_cache_tokens is None else check_int(
            "kv_cache_tokens", kv_cache_tokens, 1)
        pages = PageAllocator(-(-tokens // page_size), page_size)
        self._reservations = Reservations(pages)
        self._runner = CpuRunner(packed, pages.num_pages, page_size, cache_dtype, threads)
        self.tokenizer = _tokenizer_of(model, tokenizer)

    @property
    def weight_bytes(self):
        """Bytes of packed weights that a token reads, the head included."""
        return self._runner.weights.streamed_bytes

    @property
    def free_pages(self):
        return self._reservations.pages.free_pages

    def generate(self, prompts, params=None):
        """prompts: a text, a list of token ids, or a list of such -> a list of `RequestOutput`, one for each prompt.

        params: a `SamplingParams`, or a list with one for each prompt. A prompt that is empty, longer than the context or
        has ids outside the vocabulary raises a ValueError that names it, before anything runs.
        """
        requests, texts = self._requests(prompts, params)
        finished = {}
        for sequence, _ in self._run(requests):
            if sequence.finish_reason:
                finished[sequence.request.order, sequence.sample] = self._completion(sequence)
        return [RequestOutput(text, list(request.prompt), [finished[request.order, sample]
                                                           for sample in range(request.params.n)
                                                           if (request.order, sample) in finished])
                for request, text in zip(requests, texts)]

    def stream(self, prompts, params=None):
        """As `generate`, but yields a `StreamOutput` for each token as it comes."""
        requests, _ = self._requests(prompts, params)
        streams = {}
        for sequence, token in self._run(requests):
            key = sequence.request.order, sequence.sample
            text = ""
            if self.tokenizer is not None:
                stream = streams.setdefault(key, self.tokenizer.stream(skip_special=True))
                text = stream.push(token)
                if sequence.finish_reason:
                    text += stream.flush()
            yield StreamOutput(*key, token, text, sequence.finish_reason)

    def _requests(self, prompts, params):
        """(requests, the prompts' texts or None), all checked."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer)))
        prompts = [prompts] if single else list(prompts)
        params = params if isinstance(params, (list, tuple)) else [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params must be one SamplingParams or one for each of the {len(prompts)} prompts, got "
                             f"{len(params)}")
        requests = []
        for i, (prompt, own) in enumerate(zip(prompts, params)):
            seed = own.seed[i] if isinstance(own.seed, list) else own.seed
            requests.append(self._request(i, prompt, own, seed))
        return requests, [prompt if isinstance(prompt, str) else None for prompt in prompts]

    def _request(self, order, prompt, params, seed):
        name = f"prompts[{order}]"
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, but this LLM has no tokenizer: give it one, or give token ids")
            prompt = self.tokenizer.encode(prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this LLM has none")
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"{name} must hold at least one token id, got {prompt!r}")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold token ids, got {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"{name} holds the token id {low if low < 0 else high}, outside [0, "
                             f"{self.config.vocab_size})")
        if ids.size > self.config.block_size:
            raise ValueError(f"{name} has {ids.size} tokens, but the context holds {self.config.block_size}")
        # The last token is never read, so it needs no place in the context.
        request = Request(order, ids.tolist(), params, seed, self.config.block_size + 1)
        pages = self._reservations.pages
        if request.most_pages(pages) > pages.num_pages:
            raise ValueError(f"{name} may need {request.most_pages(pages)} pages of the KV cache, which has "
                             f"{pages.num_pages} of {pages.page_size} tokens: ask for fewer tokens or samples, or give "
                             "the LLM more kv_cache_tokens")
        return request

    def _run(self, requests):
        """Yields (sequence, new token), step by step, until all requests have ended."""
        endings = {request: Ending(request.params, self.tokenizer) for request in requests}
        with self._lock:
            scheduler = Scheduler(self._reservations, self._runner, [r for r in requests if r.params.max_tokens],
                                  self.max_step_tokens)
        try:
            while scheduler.running or scheduler.waiting:
                with self._lock:
                    made = self._step(scheduler, endings)
                yield from made
        finally:
            with self._lock:
                scheduler.close()

    def _step(self, scheduler, endings):
        """One step: [(sequence, its new token)]."""
        scheduler.admit()
        ready, tokens, rows, wanted = scheduler.plan()
        logits = np.empty((len(wanted), self.config.vocab_size), np.float32)
        self._runner.step(tokens, rows, wanted, logits)
        if not ready:
            return []
        ready, logits = self._fork(scheduler, ready, logits)
        new = self._sample(ready, logits)
        for sequence, token in zip(ready, new):
            sequence.push(token, endings[sequence.request])
            if sequence.finish_reason:
                scheduler.finish(sequence)
        return list(zip(ready, new))

    def _fork(self, scheduler, ready, logits):
        """Samples of one prompt part here: each gets a row of logits of its own."""
        if all(s.request.params.n == 1 or s.length > len(s.request.prompt) for s in ready):
            return ready, logits
        groups = [scheduler.fork(s) if s.length == len(s.request.prompt) else [s] for s in ready]
        return [s for group in groups for s in group], np.repeat(logits, [len(group) for group in groups], axis=0)

    def _sample(self, ready, logits):
        reported = [(s, row.copy()) for s, row in zip(ready, logits) if s.logprobs is not None]
        tokens = np.empty(len(ready), np.int32)
        known = self.config.vocab_size
        if self.tokenizer is not None:
            known = min(known, self.tokenizer.vocab_size)
        _C.sample(logits.ctypes.data, self.config.vocab_size, known, [s.draw() for s in ready], tokens.ctypes.data)
        if (tokens < 0).any():
            raise ValueError("the model's logits are not finite: there is no distribution to draw from")
        new = tokens.tolist()
        chosen = dict(zip(ready, new))
        for sequence, row in reported:
            sequence.logprobs.append(_log_probabilities(row, chosen[sequence], sequence.request.params.logprobs))
        return new

    def _completion(self, sequence):
        ids = sequence.new_ids
        text = "" if self.tokenizer is None else self.tokenizer.decode(ids, skip_special=True)
        if isinstance(sequence.stop_reason, str):
            text = text[:text.index(sequence.stop_reason)]
        return CompletionOutput(sequence.sample, text, ids, sequence.finish_reason, sequence.stop_reason,
                                sequence.logprobs)


def _log_probabilities(logits, chosen, count):
    """{token id: log probability} of the `count` likeliest and of the chosen one."""
    logits = logits.astype(np.float64)
    logs = logits - logits.max()
    logs -= np.log(np.exp(logs).sum())
    likeliest = np.argpartition(-logs, min(count, len(logs) - 1))[:count]
    ids = dict.fromkeys([*likeliest[np.argsort(-logs[likeliest], kind="stable")].tolist(), chosen])
    return {i: float(logs[i]) for i in ids}


class _threads:
    """Within this context the kernels have so many threads; None leaves them."""

    def __init__(self, count):
        self.count, self.before = count, extension.get_num_threads()

    def __enter__(self):
        if self.count is not None:
            extension.set_num_threads(self.count)

    def __exit__(self, *_):
        if self.count is not None:
            extension.set_num_threads(self.before)


def _open(model):
    """(config, tensors) of whatever a model is given as."""
    if not isinstance(model, (str, Path)):
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise TypeError(f"model must be a path or a fastgpt.GPT, got {type(model).__name__}")
        return weights_module.of_model(model)
    found = weights_module.of_directory(model)
    if found is None:
        from fastgpt import GPT
        found = weights_module.of_model(GPT.from_pretrained(str(model)))
    return found


def _tokenizer_of(model, tokenizer):
    from fastgpt.tokenizer import Tokenizer
    if tokenizer is not None:
        return tokenizer if hasattr(tokenizer, "decode") else Tokenizer.from_pretrained(str(tokenizer))
    if isinstance(model, (str, Path)):
        folder = Path(model) if Path(model).is_dir() else Path(model).parent
        try:
            return Tokenizer.from_dir(folder)
        except FileNotFoundError:
            pass
    return None
