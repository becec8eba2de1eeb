"""Memory for the engine: zeroed, lazily given by the system, in huge pages where it has them."""
import mmap

import numpy as np

ALIGNMENT = 64  # bytes: a cache line


class Arena:
    """One block of memory, handed out in aligned pieces. Streaming weights from 4 KB pages costs a fifth of the
    speed, reading keys and values a tenth."""

    def __init__(self, size):
        size = max(size, mmap.PAGESIZE)
        if hasattr(mmap, "MAP_PRIVATE"):
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:  # Windows
            self._map = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without them
                pass
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._used = 0

    def take(self, shape, dtype):
        """The next piece, as an array."""
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        piece = self._bytes[self._used:self._used + count]
        if piece.nbytes < count:
            raise MemoryError(f"an arena of {self._bytes.nbytes} bytes has no room for {count} more")
        self._used += rounded(count)
        return piece.view(dtype).reshape(shape)


def rounded(size):
    """Bytes that `take` uses for so many."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def address(array):
    """Where an array's data begin; 0 for None."""
    return 0 if array is None else array.__array_interface__["data"][0]
