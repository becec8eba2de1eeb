"""Requests into steps: which sequences run, what each contributes to the next step, and the pages they hold.

A request is let in when the pages that it may come to need are free: nothing is ever taken back from one that runs.
"""
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from fastgpt.engine.pages import OutOfPages
from fastgpt.engine.sequence import Sequence


@dataclass
class Step:
    """Tokens of some sequences, one sequence behind the other.

    tokens (M,) int32; places (S, 3) int64: of each sequence its first row, how many rows, and the position of the first;
    tables: its pages, int32 arrays. wanted (L,) int32: the rows whose logits give the next tokens of the sequences `ready`.
    late: {row: i} of the tokens (-1 here) that the step before drew as its i-th, and that are still on their way.
    """

    tokens: np.ndarray
    places: np.ndarray
    tables: list
    wanted: np.ndarray
    ready: list
    late: dict


class Reservations:
    """How many of an allocator's pages are promised to requests: shared by all that run on it."""

    def __init__(self, pages):
        self.pages, self.promised = pages, 0

    def take(self, count):
        """Whether so many pages could be promised."""
        if self.promised + count > self.pages.num_pages:
            return False
        self.promised += count
        return True

    def give_back(self, count):
        self.promised -= count


class Scheduler:
    """The sequences of one call. max_tokens: of a step at most; longer prompts are read in pieces."""

    def __init__(self, reservations, runner, requests, max_tokens):
        self.reservations, self.pages, self.runner = reservations, reservations.pages, runner
        self.max_tokens = max_tokens
        self.waiting, self.running = deque(requests), []
        self._tables = {}  # sequence -> its block table as an array
        self._unfinished = {}  # request -> its sequences that still run
        self._promised = 0  # pages, to requests of this call
        self.thread = threading.get_ident()

    def admit(self):
        """Lets waiting requests in, in order, as long as their pages are free. OutOfPages when nothing could run."""
        while self.waiting and self.reservations.take(self.waiting[0].most_pages(self.pages)):
            request = self.waiting.popleft()
            self._promised += request.most_pages(self.pages)
            self._unfinished[request] = 1
            self._add(Sequence(request))
        if not self.running and self.waiting:
            raise OutOfPages(f"the KV cache has {self.pages.num_pages} pages of {self.pages.page_size} tokens, of which "
                             f"{self.reservations.promised} are promised to others; a request needs "
                             f"{self.waiting[0].most_pages(self.pages)}")

    def plan(self):
        """The next `Step`, or None where all sequences wait for a token that ends them."""
        budget, row, ready, tokens, places, tables, wanted, late = self.max_tokens, 0, [], [], [], [], [], {}
        for sequence in self.running:
            if sequence.ends_when_known:
                continue
            begin, length = sequence.computed, sequence.drawn_length
            count = min(length - begin, budget)
            if count == 0:
                break
            self._reserve(sequence, count)
            places.append((row, count, begin))
            tables.append(self._tables[sequence])
            tokens.append(sequence.ids[begin:begin + count])
            sequence.computed += count
            budget, row = budget - count, row + count
            if sequence.computed == length:
                ready.append(sequence)
                wanted.append(row - 1)
                if sequence.on_its_way:
                    late[row - 1] = sequence.drawn_at
        if not places:
            return None
        tokens = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        return Step(tokens, np.array(places, np.int64), tables, np.array(wanted, np.int32), ready, late)

    def fork(self, sequence):
        """The samples of a sequence whose prompt has been read: itself and its siblings, which share its pages."""
        siblings = [sequence.sibling(sample) for sample in range(1, sequence.request.params.n)]
        self._unfinished[sequence.request] += len(siblings)
        for sibling in siblings:
            self.pages.fork(sequence, sibling)
            self._add(sibling, at=self.running.index(sequence) + sibling.sample)
        return [sequence, *siblings]

    def fork_ready(self, ready, logits, repeat):
        """Where samples of one prompt part, each gets a row of logits of its own: -> (sequences, their logits).
        repeat(counts): the rows of logits, each so often."""
        parting = [s.request.params.n > 1 and s.drawn_length == len(s.request.prompt) for s in ready]
        if not any(parting):
            return ready, logits
        groups = [self.fork(s) if parts else [s] for s, parts in zip(ready, parting)]
        return [s for group in groups for s in group], repeat([len(group) for group in groups])

    def finish(self, sequence):
        self.running.remove(sequence)
        del self._tables[sequence]
        self.pages.free(sequence)
        self._unfinished[sequence.request] -= 1
        if self._unfinished[sequence.request] == 0:
            del self._unfinished[sequence.request]
            self._give_back(sequence.request.most_pages(self.pages))

    def close(self):
        """Ends whatever runs: every page is free again."""
        for sequence in list(self.running):
            self.running.remove(sequence)
            self.pages.free(sequence)
        self.waiting.clear()
        self._give_back(self._promised)

    def _give_back(self, pages):
        self._promised -= pages
        self.reservations.give_back(pages)

    def _add(self, sequence, at=None):
        self._tables[sequence] = np.zeros(self.pages.pages_for(sequence.request.most_tokens), np.int32)
        if at is None:
            self.pages.allocate(sequence, 0)
        self.running.insert(len(self.running) if at is None else at, sequence)
        self._refresh(sequence)

    def _reserve(self, sequence, count):
        """Room in the pages for the next `count` tokens."""
        before = len(self.pages.table(sequence))
        copies = self.pages.append(sequence, count)
        self.runner.copy_pages(copies)
        if copies or len(self.pages.table(sequence)) != before:
            self._refresh(sequence)

    def _refresh(self, sequence):
        table = self.pages.table(sequence)
        self._tables[sequence][:len(table)] = table
