"""The page allocator against a naive model: what every sequence wrote is what it reads, whatever is forked and freed."""
import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastgpt.engine.pages import OutOfPages, PageAllocator


class Machine(RuleBasedStateMachine):
    """Pages as lists of tokens: each token that is appended is a new number, written where the allocator says."""

    @initialize(pages=strategies.integers(0, 12), size=strategies.integers(1, 5))
    def start(self, pages, size):
        self.pages, self.size = PageAllocator(pages, size), size
        self.memory = [[None] * size for _ in range(pages)]
        self.written = {}  # sequence -> its tokens
        self.names = self.numbers = 0

    def write(self, sequence, count):
        for _ in range(count):
            self.numbers += 1
            at = len(self.written[sequence])
            self.memory[self.pages.table(sequence)[at // self.size]][at % self.size] = self.numbers
            self.written[sequence].append(self.numbers)

    @rule(tokens=strategies.integers(0, 14))
    def allocate(self, tokens):
        self.names += 1
        try:
            self.pages.allocate(self.names, tokens)
        except OutOfPages:
            assert self.pages.pages_for(tokens) > self.pages.free_pages
            return
        self.written[self.names] = []
        self.write(self.names, tokens)

    @precondition(lambda self: self.written)
    @rule(data=strategies.data(), tokens=strategies.integers(0, 9))
    def append(self, data, tokens):
        sequence = data.draw(strategies.sampled_from(sorted(self.written)))
        before = list(self.pages.table(sequence)), self.pages.free_pages
        try:
            copies = self.pages.append(sequence, tokens)
        except OutOfPages:
            assert (self.pages.table(sequence), self.pages.free_pages) == before
            return
        for page, copy in copies:
            self.memory[copy] = list(self.memory[page])
        self.write(sequence, tokens)

    @precondition(lambda self: self.written)
    @rule(data=strategies.data())
    def fork(self, data):
        sequence = data.draw(strategies.sampled_from(sorted(self.written)))
        self.names += 1
        self.pages.fork(sequence, self.names)
        self.written[self.names] = list(self.written[sequence])

    @precondition(lambda self: self.written)
    @rule(data=strategies.data())
    def free(self, data):
        sequence = data.draw(strategies.sampled_from(sorted(self.written)))
        self.pages.free(sequence)
        del self.written[sequence]

    @invariant()
    def everyone_reads_what_he_wrote(self):
        if not hasattr(self, "pages"):
            return
        self.pages.check()
        for sequence, tokens in self.written.items():
            assert self.pages.length(sequence) == len(tokens)
            table = self.pages.table(sequence)
            assert [self.memory[table[i // self.size]][i % self.size] for i in range(len(tokens))] == tokens
        if not self.written:
            assert self.pages.free_pages == self.pages.num_pages


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def test_errors_change_nothing():
    pages = PageAllocator(2, 4)
    pages.allocate("a", 5)
    for call in (lambda: pages.allocate("b", 1), lambda: pages.append("a", 4)):
        with pytest.raises(OutOfPages, match="0 free pages of 4 tokens, 1 are needed"):
            call()
    for call in (lambda: pages.allocate("a", 0), lambda: pages.fork("a", "a")):
        with pytest.raises(ValueError, match="exists"):
            call()
    with pytest.raises(KeyError):
        pages.free("b")
    pages.check()
    assert pages.append("a", 3) == []
    pages.free("a")
    assert pages.free_pages == 2


def test_only_a_shared_page_that_is_partly_filled_is_copied():
    pages = PageAllocator(8, 4)
    pages.allocate("a", 6)
    pages.fork("a", "b")
    (old, new), = pages.append("b", 1)
    assert (pages.table("a")[1], pages.table("b")[1]) == (old, new)
    assert pages.append("a", 1) == []  # nobody else holds its page now
    pages.allocate("c", 4)
    pages.fork("c", "d")
    assert pages.append("d", 1) == []  # a full page stays shared
    assert pages.table("d")[0] == pages.table("c")[0]
    pages.check()
