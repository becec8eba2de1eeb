"""Memory for the large tensors of the ops on the CPU, apart from what else the process allocates.

glibc's malloc, from which PyTorch takes its tensors, puts small blocks between the large ones; a large one that is freed
between two of them leaves a hole into which not even its like fits, for want of the bytes of its alignment. Of a
training step's memory a sixth was holes. The pool holds large tensors alone, and has next to none.
"""
import bisect
import collections
import contextlib
import math
import mmap
import os
import threading
import weakref

import torch

LARGE = 2 << 20  # bytes from which a tensor of the ops comes from the pool
PAGE = 4096  # bytes that a tensor's place is a multiple of

_pool = None


def start():
    """From now on there is a pool, where the system lends addresses for as many bytes as the machine has memory."""
    global _pool
    if _pool is None:
        with contextlib.suppress(OSError):  # a limit on the process's addresses
            _pool = Pool(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def empty(shape, dtype, device=None, stride=()):
    """torch.empty, or torch.empty_strided, for a result of an op: from the pool where it is large and there is a pool."""
    if from_pool(shape, dtype, device):
        tensor = _pool.empty(shape, dtype, stride)
        if tensor is not None:
            return tensor
    options = {"dtype": dtype, "device": device}
    return torch.empty_strided(shape, stride, **options) if stride else torch.empty(shape, **options)


def empty_like(x):
    """A contiguous tensor of x's shape, x being contiguous."""
    return torch.empty_like(x) if _pool is None or x.nbytes < LARGE else empty(x.shape, x.dtype, x.device)


def from_pool(shape, dtype, device=None):
    """Whether a result of an op comes from the pool: where there is one, large ones on the CPU."""
    return _pool is not None and (device is None or device.type == "cpu") and math.prod(shape) * dtype.itemsize >= LARGE


def untouched_zeros(shape, dtype):
    """Zeros that take memory only where they are written, in pages of 4 KB: those of the system, new in each call."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(pages, mmap.MADV_NOHUGEPAGE)
    return _over(pages, shape, dtype)


def _advise(pages, advice):
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(advice)


def _over(buffer, shape, dtype, stride=()):
    """A tensor in the memory of a buffer, which it keeps alive. It is no view of another tensor, by `set_`; the source of
    that is a tensor, since a storage that Python has seen counts as shared, and autograd adds nothing to it in place."""
    return torch.empty(0, dtype=dtype, device="cpu").set_(torch.frombuffer(buffer, dtype=dtype), 0, shape, stride)


class Pool:
    """A range of addresses for `size` bytes of tensors, of which the system lends a page when it is first written.

    A tensor gets the first free place that is large enough, and free places that touch become one. The place is
    held by the tensor's storage, through a view of the range that dies with it.
    """

    def __init__(self, size):
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(self.memory, mmap.MADV_HUGEPAGE)
        self.free = [(0, size)]  # (begin, end), by address; no two touch
        self._unlock()
        os.register_at_fork(after_in_child=self._unlock)  # another thread may have held it
        self.taken = {}  # begin -> a weak reference to the view that holds the place
        self.returned = collections.deque()  # places given back, at any moment of any thread, since the last look

    def _unlock(self):
        self.lock = threading.Lock()  # of `free`

    def empty(self, shape, dtype, stride=()):
        """An uninitialised tensor; None where there is no room."""
        size = math.prod(shape) * dtype.itemsize
        with self.lock:
            place = self._take(-(-size // PAGE) * PAGE)
        if place is None:
            return None
        view = memoryview(self.memory)[place[0]:place[0] + size]
        self.taken[place[0]] = weakref.ref(view, lambda _: self.returned.append(place))
        return _over(view, shape, dtype, stride)

    def _take(self, size):
        """The (begin, end) of the first free place of that size."""
        while self.returned:
            place = self.returned.popleft()
            del self.taken[place[0]]
            self._join(*place)
        for i, (begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[i:i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin, begin + size
        return None

    def _join(self, begin, end):
        after = bisect.bisect(self.free, (begin, end))
        if after < len(self.free) and self.free[after][0] == end:
            end = self.free.pop(after)[1]
        if after and self.free[after - 1][1] == begin:
            after -= 1
            begin = self.free.pop(after)[0]
        self.free.insert(after, (begin, end))
