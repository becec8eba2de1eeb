"""The pages of a KV cache: who holds which, counted in integers alone; no tensor is touched here.

A sequence's tokens lie in its block table's pages in order. Sequences that were forked share pages, and the first to
append to a shared, partly filled page gets a copy of its own (Kwon et al. 2023, arXiv:2309.06180).
"""


class OutOfPages(RuntimeError):
    """There are fewer free pages than a call needs; nothing has been changed."""


class PageAllocator:
    """num_pages pages of page_size tokens each, for sequences that the caller names by any hashable id."""

    def __init__(self, num_pages, page_size):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))  # the last is taken first: pages used before are warm
        self._holders = [0] * num_pages
        self._tables, self._lengths = {}, {}

    @property
    def free_pages(self):
        return len(self._free)

    def pages_for(self, tokens):
        return -(-tokens // self.page_size)

    def table(self, sequence):
        """The pages of a sequence, in order. The caller must not change the list."""
        return self._tables[sequence]

    def length(self, sequence):
        return self._lengths[sequence]

    def allocate(self, sequence, tokens):
        """A new sequence with room for so many tokens."""
        if sequence in self._tables:
            raise ValueError(f"the sequence {sequence!r} exists already")
        self._require(self.pages_for(tokens))
        self._tables[sequence] = [self._take() for _ in range(self.pages_for(tokens))]
        self._lengths[sequence] = tokens

    def append(self, sequence, tokens):
        """Room for so many more tokens: -> [(page, copy)], the pages whose contents the caller must copy first."""
        table, length = self._tables[sequence], self._lengths[sequence]
        new = self.pages_for(length + tokens) - len(table)
        shared = tokens > 0 and length % self.page_size > 0 and self._holders[table[-1]] > 1
        self._require(new + shared)
        copies = []
        if shared:
            copies.append((table[-1], self._take()))
            self._release(table[-1])
            table[-1] = copies[0][1]
        table.extend(self._take() for _ in range(new))
        self._lengths[sequence] = length + tokens
        return copies

    def fork(self, sequence, child):
        """A new sequence with the same tokens, in the same pages."""
        if child in self._tables:
            raise ValueError(f"the sequence {child!r} exists already")
        self._tables[child] = list(self._tables[sequence])
        self._lengths[child] = self._lengths[sequence]
        for page in self._tables[child]:
            self._holders[page] += 1

    def free(self, sequence):
        """Ends a sequence; the pages that nobody else holds are free again."""
        table = self._tables.pop(sequence)
        del self._lengths[sequence]
        for page in reversed(table):
            self._release(page)

    def check(self):
        """Raises AssertionError where the books are wrong: each page is free or held as often as tables name it."""
        held = [0] * self.num_pages
        for sequence, table in self._tables.items():
            assert len(table) == self.pages_for(self._lengths[sequence]), f"{sequence!r}: {len(table)} pages"
            assert len(set(table)) == len(table), f"{sequence!r} holds a page twice"
            for page in table:
                held[page] += 1
        assert held == self._holders, "holders are miscounted"
        assert sorted(self._free) == [page for page, count in enumerate(held) if count == 0], "free pages are wrong"

    def _require(self, pages):
        if pages > len(self._free):
            raise OutOfPages(f"the KV cache has {len(self._free)} free pages of {self.page_size} tokens, {pages} are "
                             "needed")

    def _take(self):
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, page):
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)
