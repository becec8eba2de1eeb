"""`fastgpt.LLM`: text or token ids in, text, token ids and log probabilities out, on the decode engine."""
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastgpt.config import GPTConfig, check_int
from fastgpt.engine import weights as weights_module
from fastgpt.engine.backends import NotFinite, backend_of, choose, refuse_other_kernels
from fastgpt.engine.pages import OutOfPages, PageAllocator
from fastgpt.engine.scheduler import Reservations, Scheduler
from fastgpt.engine.sequence import Ending, Request
from fastgpt.loading import checkpoint_folder
from fastgpt.sampling import SamplingParams
from fastgpt.text import StopFilter, known_ids

PAGE_SIZE = 64
STEP_TOKENS = 512  # of prompts, in one step
MOST_CACHE_TOKENS = 2 ** 27
PATIENCE = 0.05  # seconds between two looks at pages that another thread holds


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

    model: the path of a directory as transformers or `GPT.save_pretrained` writes it, of a training run, of anything else
    that `GPT.from_pretrained` takes, or a `fastgpt.GPT`, whose weights are copied.
    device: "cpu", or "cuda" or "cuda:1" for an NVIDIA GPU.
    dtype: of the weights: "float32", "bfloat16", "int8" (a scale for each output) or "int4" (a scale for each 32 weights), and on
    a GPU "float16". By default float32 on the CPU, bfloat16 on a GPU.
    threads: of this engine's steps on the CPU; None for `fastgpt.get_num_threads()`.
    kv_cache_tokens: how many tokens' keys and values fit, on the CPU by default those of 16 full contexts, and memory is
    taken as it is used; on a GPU those of 256, or as many as 80 % of its free memory hold. page_size: tokens of a page, on
    the CPU a multiple of 16. kv_cache_dtype: "float32", "bfloat16" or "int8", and on a GPU "float16" or "float8"; by default
    that of the weights, for those of few bits that of what they are multiplied by, bfloat16 on the CPU.
    tokenizer: a `fastgpt.Tokenizer` or a path; by default the directory's own, if it has one.
    warm_up: on a GPU the most sequences at once for which everything is compiled and captured now, so that no request waits for
    that; what more needs is made when it is first needed, with 0 all of it.

    On the CPU the logits of a token have the same bits whatever else runs, however its prompt was cut, whichever pages it got
    and on any number of threads. Safe to call from several threads; their steps take turns.
    """

    _shares_weights = False  # with a model on the same GPU

    def __init__(self, model, dtype=None, threads=None, kv_cache_tokens=None, page_size=None, kv_cache_dtype=None,
                 tokenizer=None, max_step_tokens=STEP_TOKENS, device="cpu", warm_up=256):
        self._lock = threading.Condition(threading.Lock())  # of steps, pages and reservations; told when pages come free
        self._active, self._ended = [], deque()  # schedulers of calls that run, and of those that are to be closed
        self.max_step_tokens = check_int("max_step_tokens", max_step_tokens, 1)
        warm_up = check_int("warm_up", warm_up, 0)
        self._backend = backend_of(device, threads, self._shares_weights)
        refuse_other_kernels(self._backend)
        self._page_size = self._backend.page_size(PAGE_SIZE if page_size is None else page_size)
        if isinstance(model, (str, Path)):
            model = checkpoint_folder(model)
        self._weights = self._backend.weights(*_open(model), dtype)
        self.config, self.dtype = self._weights.config, self._weights.dtype
        self.kv_cache_dtype = self._backend.cache_dtype(self._weights, kv_cache_dtype)
        self._make_cache(self._backend.cache_tokens(self._weights, self.kv_cache_dtype) if kv_cache_tokens is None else
                         check_int("kv_cache_tokens", kv_cache_tokens, 1, MOST_CACHE_TOKENS))
        self.tokenizer = _tokenizer_of(model, tokenizer)
        if warm_up:
            self._backend.warm_up(self, warm_up)

    def _make_cache(self, tokens):
        pages = PageAllocator(-(-tokens // self._page_size), self._page_size)
        # The memory of the one before comes free first; should there be too little for the new one, there is none.
        self.runner, self._reservations = None, Reservations(PageAllocator(0, self._page_size))
        try:
            self.runner = self._backend.runner(self._weights, pages.num_pages, self._page_size, self.kv_cache_dtype)
        except self._backend.out_of_memory as error:
            raise MemoryError(f"kv_cache_tokens: there is no memory for a cache of {tokens} tokens ({error})") from error
        self._reservations = Reservations(pages)

    @property
    def weight_bytes(self):
        """Bytes of packed weights that a token reads, the head included."""
        return self._weights.streamed_bytes

    @property
    def free_pages(self):
        return self._reservations.pages.free_pages

    def generate(self, prompts, params=None):
        """prompts: a text, a list of token ids, or a list of such -> a list of `RequestOutput`, one for each prompt.

        params: a `SamplingParams`, or a list with one for each prompt. A prompt that is empty, longer than the context or
        has ids outside the vocabulary raises a ValueError that names it, before anything runs.
        """
        requests, texts = self._requests(prompts, params)
        # A request for no tokens at all has ended before it begins.
        outputs = [[CompletionOutput(i, "", [], "length") for i in range(r.params.n)] for r in requests]
        for sequence, _ in self._run(requests, self._endings(requests)):
            if sequence.finish_reason:
                outputs[sequence.request.order][sequence.sample] = self._completion(sequence)
        return [RequestOutput(text, list(request.prompt), of_request)
                for request, text, of_request in zip(requests, texts, outputs)]

    def stream(self, prompts, params=None):
        """As `generate`, but yields a `StreamOutput` for each token as it comes."""
        requests, _ = self._requests(prompts, params)
        texts = {}
        for sequence, token in self._run(requests, self._endings(requests)):
            key = sequence.request.order, sequence.sample
            if key not in texts:
                texts[key] = _TextStream(self.tokenizer, sequence.request.params.stop)
            yield StreamOutput(*key, token, texts[key].push(token, sequence.finish_reason), sequence.finish_reason)

    def logits(self, prompt):
        """The logits behind each token of a prompt (a text or T ids, at most the context): (T, vocab_size) float32."""
        request, = self._requests([prompt], SamplingParams(max_tokens=0))[0]
        logits = np.empty((len(request.prompt), self.config.vocab_size), np.float32)
        with self._lock:
            scheduler = Scheduler(self._reservations, self.runner, [request], self.max_step_tokens)
            try:
                self._close_ended()
                scheduler.admit()
                done = 0
                while done < len(logits):
                    step = scheduler.plan()
                    step.wanted = np.arange(len(step.tokens), dtype=np.int32)
                    self.runner.step(step, logits[done:done + len(step.tokens)])
                    done += len(step.tokens)
            finally:
                scheduler.close()
        return logits

    def _requests(self, prompts, params):
        """(requests, the prompts' texts or None), all checked."""
        refuse_other_kernels(self._backend)
        if not hasattr(prompts, "__iter__"):
            raise TypeError(f"prompts must be a text, token ids or a list of such, got {type(prompts).__name__}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if prompts and isinstance(prompts[0], (int, np.integer)):
            prompts = [prompts]
        params = SamplingParams() if params is None else params
        several = isinstance(params, (list, tuple))
        if several and len(params) != len(prompts):
            raise ValueError(f"params must be one SamplingParams or one for each of the {len(prompts)} prompts, got "
                             f"{len(params)}")
        requests = []
        for i, prompt in enumerate(prompts):
            own = params[i] if several else params
            if not isinstance(own, SamplingParams):
                raise TypeError(f"params must be a SamplingParams or a list of them, got {type(own).__name__}")
            seed = own.seeds(1)[0] if several else own.seeds(len(prompts))[i]
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
        try:
            ids = np.asarray(prompt)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must hold token ids, got {prompt!r}") from error
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
        request = Request(order, ids.tolist(), params, seed, self.config)
        pages = self._reservations.pages
        if request.most_pages(pages) > pages.num_pages:
            raise ValueError(f"{name} may need {request.most_pages(pages)} pages of the KV cache, which has "
                             f"{pages.num_pages} of {pages.page_size} tokens: ask for fewer tokens or samples, or give "
                             "the LLM more kv_cache_tokens")
        return request

    def _endings(self, requests):
        return {request: Ending(request.params, self.tokenizer) for request in requests}

    def _run(self, requests, endings):
        """Yields (sequence, new token), step by step, until all requests have ended. endings: of each request."""
        scheduler = Scheduler(self._reservations, self.runner, [r for r in requests if r.params.max_tokens],
                              self.max_step_tokens)
        self._active.append(scheduler)
        under_way = None  # a step whose tokens are still unknown
        try:
            while scheduler.running or scheduler.waiting:
                with self._lock:
                    self._close_ended()
                    while not self._admit(scheduler):
                        self._lock.wait(PATIENCE)
                    made, under_way = self._backend.advance(self, scheduler, endings, under_way)
                    self._lock.notify_all()  # pages may have come free
                yield from made
        finally:
            # Perhaps by the garbage collector, in the middle of a step of this very thread: then that step's successor closes.
            self._ended.append(scheduler)
            if self._lock.acquire(blocking=False):
                try:
                    self._close_ended()
                finally:
                    self._lock.release()

    def _close_ended(self):
        while self._ended:
            scheduler = self._ended.popleft()
            scheduler.close()
            self._active.remove(scheduler)
        self._lock.notify_all()

    def _admit(self, scheduler):
        """Whether the scheduler has something to run; False while another thread holds the pages that it needs."""
        try:
            scheduler.admit()
        except OutOfPages:
            if not any(other.running and other.thread != scheduler.thread for other in self._active):
                raise
            return False
        return True

    @staticmethod
    def push(scheduler, endings, ready, new):
        """The new tokens of sequences: -> [(sequence, its token)]."""
        if new and min(new) < 0:
            raise NotFinite("the model's logits are not finite: there is no distribution to draw from")
        scheduler.know(ready)
        made = list(zip(ready, new))
        for sequence, token in made:
            if sequence.push(token, endings[sequence.request]):
                scheduler.finish(sequence)
        return made

    def choose(self, ready, logits):
        """The next token of each sequence on the CPU: logits (R, V), which are overwritten, -> R ids."""
        return choose(logits, self.known_ids(), ready)

    def known_ids(self):
        """How many ids may be drawn."""
        known = known_ids(self.tokenizer)
        return self.config.vocab_size if known is None else min(known, self.config.vocab_size)

    def _completion(self, sequence):
        ids = sequence.new_ids
        text = "" if self.tokenizer is None else self.tokenizer.decode(ids, skip_special=True)
        if isinstance(sequence.stop_reason, str):
            text = text.partition(sequence.stop_reason)[0]
        return CompletionOutput(sequence.sample, text, ids, sequence.finish_reason, sequence.stop_reason,
                                sequence.logprobs)


class _TextStream:
    """The text of a sequence token by token, up to its stop string; nothing without a tokenizer."""

    def __init__(self, tokenizer, stops):
        self.stream, self.filter = tokenizer and tokenizer.stream(skip_special=True), StopFilter(stops)

    def push(self, token, last):
        if self.stream is None:
            return ""
        return self.filter.push(self.stream.push(token) + (self.stream.flush() if last else ""), bool(last))


def _open(model):
    """(config, tensors) of whatever a model is given as."""
    if not isinstance(model, (str, Path)):
        if not isinstance(getattr(model, "config", None), GPTConfig):
            raise TypeError(f"model must be a path or a fastgpt.GPT, got {type(model).__name__}")
        return weights_module.of_model(model)
    found = weights_module.of_directory(model)
    if found is None:
        from fastgpt import GPT
        found = weights_module.of_model(GPT.from_pretrained(str(model)))
    return found


def _tokenizer_of(model, tokenizer):
    """The tokenizer that was given, else the model's own, else None."""
    from fastgpt.tokenizer import Tokenizer
    if tokenizer is not None:
        return tokenizer if hasattr(tokenizer, "decode") else Tokenizer.from_pretrained(str(tokenizer))
    if not isinstance(model, (str, Path)):
        return None
    place = Path(model).parent if Path(model).is_file() else model
    try:
        return Tokenizer.from_pretrained(str(place))
    except FileNotFoundError:
        return None
