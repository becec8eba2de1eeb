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
    tables (S, P) int32: its pages. wanted (L,) int32: the rows whose logits give the next tokens of the sequences `ready`.
    late (2, N) int64: rows of tokens (-1 here) that are still on their way, and as which token the step before drew each.
    """

    tokens: np.ndarray
    places: np.ndarray
    tables: np.ndarray
    wanted: np.ndarray
    ready: list
    late: np.ndarray


@dataclass
class _Steady:
    """A step of all that run, a token each, which goes on as it is: the columns of `_Lanes` do not have yet that it was planned,
    drawn and learnt so often. first: how many tokens the first sequence had drawn then; left: how often it may go on."""

    step: Step
    first: int
    left: int
    planned: int = 0
    drawn: int = 0
    known: int = 0


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


class _Lanes:
    """Where the running sequences stand, as columns, so that a step costs no look at each: a sequence's lane is its place in them.

    computed: how many of its tokens are in the KV cache; drawn: how many it has; known: those that the host knows; most: how
    many it may have; room: how many tokens its own pages hold; drawn_at: as which of its step the last was drawn. int64.
    tables (lanes, width) int32: its pages.
    """

    NAMES = ("computed", "drawn", "known", "most", "room", "drawn_at")

    def __init__(self, width):
        self._free, self._numbers = [], np.zeros((len(self.NAMES), 0), np.int64)
        self.tables = np.zeros((0, width), np.int32)

    def take(self):
        """A lane of zeros."""
        if not self._free:
            count = len(self.tables)
            self._free = list(range(2 * count + 7, count - 1, -1))
            self._numbers = np.pad(self._numbers, ((0, 0), (0, count + 8)))
            self.tables = np.pad(self.tables, ((0, count + 8), (0, 0)))
            for name, numbers in zip(self.NAMES, self._numbers):
                setattr(self, name, numbers)
        return self._free.pop()

    def copy(self, lane):
        new = self.take()
        self._numbers[:, new], self.tables[new] = self._numbers[:, lane], self.tables[lane]
        return new

    def give_back(self, lane):
        self._numbers[:, lane], self.tables[lane] = 0, 0
        self._free.append(lane)


class Scheduler:
    """The sequences of one call. max_tokens: of a step at most; longer prompts are read in pieces."""

    def __init__(self, reservations, runner, requests, max_tokens):
        self.reservations, self.pages, self.runner = reservations, reservations.pages, runner
        self.max_tokens = max_tokens
        self.waiting, self.running = deque(requests), []
        self._at = _Lanes(max((self.pages.pages_for(request.most_tokens) for request in requests), default=0))
        self._steady = None
        self._order = None  # the lanes of those that run, in order; None when they have changed
        self._penalises = False  # whether one of them has a penalty
        self._unfinished = {}  # request -> its sequences that still run
        self._parting = set()  # sequences of several samples that share a prompt still
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
        """The next `Step`, which the one after it may overwrite, or None where all sequences wait for a token that ends them."""
        steady = self._steady
        if steady is not None and steady.left > 0 and steady.drawn == steady.planned + 1:
            return self._go_on(steady)
        self._settle()
        at, lanes, running = self._at, self._lanes(), self.running
        drawn, computed, late = at.drawn[lanes], at.computed[lanes], at.drawn[lanes] > at.known[lanes]
        left = np.where(late & (drawn >= at.most[lanes]), 0, drawn - computed)  # the last token is never read
        counts = np.minimum(left, np.maximum(self.max_tokens - (left.cumsum() - left), 0))
        if not (len(counts) and counts.all()):
            some = np.flatnonzero(counts)
            if not len(some):
                return None
            running = [running[i] for i in some]
            lanes, drawn, computed, late, counts = (column[some] for column in (lanes, drawn, computed, late, counts))
        ends, last = computed + counts, counts.cumsum()
        for i in np.flatnonzero(ends > at.room[lanes]).tolist():
            self._reserve(running[i], int(ends[i]))
        at.computed[lanes] = ends
        done = ends == drawn
        ready = running if done.all() else [running[i] for i in np.flatnonzero(done)]
        late &= done
        tokens = np.full(last[-1], -1, np.int32)
        for i in np.flatnonzero(~late).tolist():
            tokens[last[i] - counts[i]:last[i]] = running[i].ids[computed[i]:ends[i]]
        places = np.stack((last - counts, counts, computed), axis=1)
        wanted = (last[done] - 1).astype(np.int32)
        step = Step(tokens, places, at.tables[lanes], wanted, list(ready), np.stack((last[late] - 1, at.drawn_at[lanes[late]])))
        if len(ready) == last[-1] == len(self.running) and not self._parting and late.any() == late.all():
            left = np.minimum(at.room[lanes], at.most[lanes] - 1) - ends
            self._steady = _Steady(step, int(drawn[0]), int(left.min()))
        return step

    def _go_on(self, steady):
        step, ready = steady.step, steady.step.ready
        step.places[:, 2] += 1
        steady.planned, steady.left = steady.planned + 1, steady.left - 1
        if steady.first + steady.drawn > ready[0].length:  # and so it is with all
            if steady.planned == 1 or not step.late.size:
                step.tokens, step.late = np.full(len(ready), -1, np.int32), np.tile(np.arange(len(ready)), (2, 1))
        else:
            step.tokens = np.array([sequence.ids[sequence.length - 1] for sequence in ready], np.int32)
            step.late = step.late[:, :0]
        return step

    def _settle(self):
        """Brings the columns up to date."""
        steady, self._steady = self._steady, None
        if steady is None:
            return
        at, lanes = self._at, self._order
        at.computed[lanes] += steady.planned
        at.known[lanes] += steady.known
        if steady.drawn:
            at.drawn[lanes] += steady.drawn
            at.drawn_at[lanes] = np.arange(len(lanes))

    def _change(self):
        """Those that run become others."""
        self._settle()
        self._order = None

    def drew(self, ready):
        """A step has drawn the next token of each sequence, in this order."""
        if self._steady is not None and ready is self._steady.step.ready:
            self._steady.drawn += 1
            return
        lanes = [sequence.lane for sequence in ready]
        self._at.drawn[lanes] += 1
        self._at.drawn_at[lanes] = np.arange(len(lanes))

    def know(self, ready):
        """The host has learnt the next token of each sequence."""
        if self._steady is not None and ready is self._steady.step.ready:
            self._steady.known += 1
            return
        self._at.known[[sequence.lane for sequence in ready]] += 1

    def drawn(self, ready):
        """How many tokens each sequence has, those that are still on their way among them."""
        self._settle()
        return self._at.drawn[[sequence.lane for sequence in ready]]

    def drawn_at(self, ready):
        """As which token the step before drew the last one of each sequence, where that is still on its way."""
        self._settle()
        return self._at.drawn_at[[sequence.lane for sequence in ready]]

    @property
    def penalises(self):
        """Whether what is drawn next depends on the tokens so far."""
        self._lanes()
        return self._penalises

    def _lanes(self):
        if self._order is None:
            self._order = np.array([sequence.lane for sequence in self.running], np.int64)
            self._penalises = any(sequence.request.params.penalises for sequence in self.running)
        return self._order

    def fork(self, sequence):
        """The samples of a sequence whose prompt has been read: itself and its siblings, which share its pages."""
        siblings = [sequence.sibling(sample) for sample in range(1, sequence.request.params.n)]
        self._change()
        self._parting.remove(sequence)
        self._unfinished[sequence.request] += len(siblings)
        at = self.running.index(sequence)
        for sibling in siblings:
            self.pages.fork(sequence, sibling)
            sibling.lane = self._at.copy(sequence.lane)
        self.running[at + 1:at + 1] = siblings
        return [sequence, *siblings]

    def fork_ready(self, ready, logits, repeat):
        """Where samples of one prompt part, each gets a row of logits of its own: -> (sequences, their logits).
        repeat(counts): the rows of logits, each so often."""
        if self._parting.isdisjoint(ready):
            return ready, logits
        groups = [self.fork(s) if s in self._parting else [s] for s in ready]
        return [s for group in groups for s in group], repeat([len(group) for group in groups])

    def finish(self, sequence):
        self._change()
        self.running.remove(sequence)
        self._at.give_back(sequence.lane)
        self.pages.free(sequence)
        self._unfinished[sequence.request] -= 1
        if self._unfinished[sequence.request] == 0:
            del self._unfinished[sequence.request]
            self._give_back(sequence.request.most_pages(self.pages))

    def close(self):
        """Ends whatever runs: every page is free again."""
        for sequence in self.running:
            self.pages.free(sequence)
        self._change()
        self.running = []
        self.waiting.clear()
        self._give_back(self._promised)

    def _give_back(self, pages):
        self._promised -= pages
        self.reservations.give_back(pages)

    def _add(self, sequence):
        self._change()
        at, lane = self._at, self._at.take()
        sequence.lane, at.most[lane] = lane, sequence.request.most_tokens
        at.drawn[lane] = at.known[lane] = sequence.length
        self.pages.allocate(sequence, 0)
        self.running.append(sequence)
        if sequence.request.params.n > 1:
            self._parting.add(sequence)

    def _reserve(self, sequence, end):
        """Room in the pages for the tokens up to `end`, and then for all that their last page holds; samples that will part
        count the prompt's tokens in it."""
        pages = self.pages
        reach = end if sequence in self._parting else pages.pages_for(end) * pages.page_size
        self.runner.copy_pages(pages.append(sequence, reach - pages.length(sequence)))
        table = pages.table(sequence)
        self._at.room[sequence.lane] = reach
        self._at.tables[sequence.lane, :len(table)] = table
