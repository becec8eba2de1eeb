"""The scheduler against a naive model: what a step computes of a sequence follows what was computed before, and lies in pages that
hold the sequence's tokens, whatever requests come with it, end, part or wait."""
import random

import numpy as np
import pytest

from fastgpt import SamplingParams
from fastgpt.engine.pages import PageAllocator
from fastgpt.engine.scheduler import Reservations, Scheduler
from fastgpt.engine.sequence import Ending, Request

pytest.importorskip("fastgpt._C")


class Config:
    block_size, vocab_size = 40, 1000


class Model:
    """What was written into the pages, and what each sequence has, by tokens that nobody else has."""

    def __init__(self, pages):
        self.memory = np.full((pages.num_pages, pages.page_size), -1)
        self.size, self.numbers = pages.page_size, 1000
        self.tokens, self.written, self.last = {}, {}, []

    def copy_pages(self, copies):
        for page, copy in copies:
            self.memory[copy] = self.memory[page]

    def of(self, sequence):
        return self.tokens.setdefault(sequence, list(sequence.request.prompt))

    def run(self, step, at_once):
        """Does what the step says: -> how many of its tokens were still on their way."""
        assert at_once or step.late.shape[1] == (step.tokens == -1).sum()
        on_their_way = dict(zip(*step.late.tolist()))
        rows = 0
        for (row, count, begin), table in zip(step.places.tolist(), step.tables):
            assert row == rows and count > 0
            rows += count
            owner = next(s for s in self.running if s not in self.seen and self.matches(s, begin, table))
            self.seen.add(owner)
            for i in range(count):
                token = step.tokens[row + i]
                if row + i in on_their_way:
                    assert token == -1 and self.last[on_their_way[row + i]] is owner
                    token = self.of(owner)[begin + i]
                assert token == self.of(owner)[begin + i]
                self.memory[table[(begin + i) // self.size], (begin + i) % self.size] = token
            self.written[owner] = begin + count
            assert begin + count < owner.most, "the last token is never read"
        assert rows == len(step.tokens)
        owners = [sequence for sequence in self.running if sequence in self.seen]
        ready = [i for i, sequence in enumerate(owners) if self.written[sequence] == len(self.of(sequence))]
        assert [owners[i] for i in ready] == step.ready
        assert step.places[ready, :2].sum(1).tolist() == (step.wanted + 1).tolist()
        return len(on_their_way)

    def matches(self, sequence, begin, table):
        """Whether a sequence's first tokens lie in the pages."""
        if self.written.get(sequence, 0) != begin:
            return False
        places = np.arange(begin)
        return np.array_equal(self.memory[table[places // self.size], places % self.size], self.of(sequence)[:begin])

    def draw(self, ready):
        self.last = list(ready)
        for sequence in ready:
            self.numbers += 1
            self.of(sequence).append(self.numbers)


@pytest.mark.parametrize("seed", range(40))
def test_what_a_step_computes(seed):
    """Tokens that are known at once, as on the CPU, or one step later, as on a GPU; sometimes a GPU's are waited for."""
    chance, pages = random.Random(seed), PageAllocator(14, 4)
    ends = [5000 + i for i in range(3)]
    requests = [Request(i, [100 * i + j for j in range(chance.randint(1, 12))], SamplingParams(
        max_tokens=chance.randint(1, 25), n=chance.choice((1, 1, 1, 3)), stop_token_ids=ends), 0, Config) for i in range(9)]
    requests = [request for request in requests if request.most_pages(pages) <= pages.num_pages]
    model = Model(pages)
    scheduler = Scheduler(Reservations(pages), model, requests, chance.choice((3, 9, 100)))
    ending, late = Ending(requests[0].params, None), seed % 2
    under_way, steps, went_on, on_their_way, finished = None, 0, 0, 0, 0

    def learn(ready):
        going = [s for s in ready if s.finish_reason is None]
        scheduler.know(ready if len(going) == len(ready) else going)
        for sequence in going:
            if sequence.push(model.of(sequence)[sequence.length], ending):
                scheduler.finish(sequence)
        return sum(s.finish_reason is not None for s in going)

    while scheduler.running or scheduler.waiting:
        scheduler.admit()
        if under_way and chance.random() < 0.1:
            finished += learn(under_way)
            under_way = None
        model.running, model.seen = list(scheduler.running), set()
        step, ready = scheduler.plan(), None
        if step is not None:
            on_their_way += model.run(step, not late)
            ready, _ = scheduler.fork_ready(step.ready, None, lambda counts: None)
            for sequence in ready:
                if sequence not in model.tokens:  # a sibling has what its sequence has
                    first = next(s for s in ready if s.request is sequence.request and s.sample == 0)
                    model.written[sequence] = model.written[first]
            model.draw(ready)
            for sequence in ready:
                if chance.random() < 0.03:
                    model.of(sequence)[-1] = chance.choice(ends)
            scheduler.drew(ready)
            went_on += scheduler._steady is not None and scheduler._steady.planned > 0
            if chance.random() < 0.05:
                assert scheduler.drawn(ready).tolist() == [len(model.of(s)) for s in ready]
        if late:
            finished += learn(under_way or [])
            under_way = ready or None
        else:
            finished += learn(ready or [])
        pages.check()
        steps += 1
    assert finished == sum(request.params.n for request in requests) and pages.free_pages == pages.num_pages
    assert steps > 20 and went_on and (on_their_way > 0) == bool(late)
