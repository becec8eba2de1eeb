"""A sequence in the making: its tokens, how its next one is drawn, and when it has ended."""
import random

import numpy as np

from fastgpt.engine.memory import address
from fastgpt.sampling import uniform


class Request:
    """A prompt and what is wanted of it. order: its place among the prompts of a call."""

    def __init__(self, order, prompt, params, seed, config):
        self.order, self.prompt, self.params = order, prompt, params
        self.seed = random.getrandbits(63) if seed is None else seed
        # Of a sequence, prompt included. The last token is never read, so it needs no place in the context.
        self.most_tokens = min(len(prompt) + params.max_tokens, config.block_size + 1)
        bias = {i: b for i, b in params.logit_bias.items() if i < config.vocab_size}
        self.bias_ids, self.bias = np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)

    def most_pages(self, pages):
        """How many pages of an allocator its sequences may come to hold: whole pages of the prompt are shared."""
        read = max(len(self.prompt), self.most_tokens - 1)
        shared = len(self.prompt) // pages.page_size
        return shared + self.params.n * (pages.pages_for(read) - shared)


class Sequence:
    """One of a request's n samples. ids[:length] are its tokens, those that have been drawn but are not known yet aside; lane:
    where the scheduler's columns have it."""

    def __init__(self, request, sample=0):
        self.request, self.sample = request, sample
        self.most = request.most_tokens
        self.ids = np.empty(self.most, np.int32)
        self.ids[:len(request.prompt)] = request.prompt
        self.length, self.lane = len(request.prompt), None
        self.finish_reason = self.stop_reason = None
        self.logprobs = [] if request.params.logprobs is not None else None
        p, r = request.params, request
        # csrc/engine.h's Draw: what comes before and behind the part that changes with each token.
        self._draw = (p.temperature, p.top_k or 0, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty,
                      p.frequency_penalty)
        self._bias = address(r.bias_ids), address(r.bias), len(r.bias)

    @property
    def new_ids(self):
        return self.ids[len(self.request.prompt):self.length].tolist()

    def sibling(self, sample):
        """Another sample of the same request, which has got no token yet."""
        return Sequence(self.request, sample)

    def draw(self):
        """csrc/engine.h's Draw for the next token."""
        params = self.request.params
        number = 0.0 if params.temperature == 0 else uniform(self.request.seed, self.sample, self.length)
        history = (address(self.ids), len(self.request.prompt), self.length) if params.penalises else (0, 0, 0)
        return (*self._draw, number, *history, *self._bias)

    def push(self, token, ending):
        """Whether it has ended. ending: an `Ending`, which knows what ends a sequence."""
        self.ids[self.length] = token
        self.length += 1
        if ending.stop or token in ending.last:
            self.finish_reason, self.stop_reason = ending.look(token, self.ids[:self.length], len(self.request.prompt))
        if self.length >= self.most and self.finish_reason is None:
            self.finish_reason = "length"
        return self.finish_reason is not None


class Ending:
    """What ends sequences before their length does: ids and stop strings."""

    def __init__(self, params, tokenizer):
        self.stop, self.decode = params.stop, None if tokenizer is None else tokenizer.decode
        self.ids = set(params.stop_token_ids)
        self.eos = None if tokenizer is None or params.ignore_eos else getattr(tokenizer, "eos_token_id", None)
        self.last = self.ids | {self.eos}
        # A stop string that has just become whole lies within so many last bytes.
        self.tail = max((len(text.encode()) for text in self.stop), default=0) + 1

    def look(self, token, ids, prompt):
        """(finish reason, stop reason) behind a new token, both None while the sequence goes on: "stop" and the id or the
        string that ended it, None of the tokenizer's end. ids: with the token; the first `prompt` are not new."""
        if token == self.eos:
            return "stop", None
        if token in self.ids:
            return "stop", token
        found = self._stop_string(ids[prompt:]) if self.stop else None
        return (None, None) if found is None else ("stop", found)

    def _stop_string(self, ids):
        width = self.tail
        while True:
            text = self.decode([int(token) for token in ids[-width:]])
            found = [(text.index(stop), stop) for stop in self.stop if stop in text]
            if found:
                return min(found)[1]
            if width >= len(ids) or len(text.encode()) >= self.tail:
                return None
            width *= 2  # some tokens added no text
