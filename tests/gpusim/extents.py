"""Which addresses the arguments of a launch cover."""
import numpy as np


def byte_extent(tensor):
    """(first address, address after the last) of a view's own elements, which may be less than its storage."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    first = tensor.data_ptr()
    return first, first + (reach + 1) * tensor.element_size()


class Extents:
    """Sorted, disjoint ranges of addresses, numbered from 0: those of the tensors, overlapping ones joined.

    first, end: uint64 arrays of the ranges' bounds; bytes: their total size; start: of a range in that total.
    """

    def __init__(self, tensors):
        ranges = _joined(sorted(byte_extent(tensor) for tensor in tensors if tensor.numel()))
        self.first = np.array([first for first, _ in ranges], np.uint64)
        self.end = np.array([end for _, end in ranges], np.uint64)
        ends = np.cumsum(self.end - self.first).astype(np.int64)
        self.start = np.concatenate([np.zeros(1, np.int64), ends])
        self.bytes = int(self.start[-1])

    def locate(self, addresses, size):
        """(range, inside) per address: the number of the range, and whether `size` bytes from there lie in it."""
        if not self.first.size:
            return np.zeros(addresses.shape, np.int64), np.zeros(addresses.shape, bool)
        below = np.searchsorted(self.first, addresses, side="right").astype(np.int64) - 1
        number = np.maximum(below, 0)
        return number, (below >= 0) & (addresses + np.uint64(size) <= self.end[number])

    def offset(self, addresses, number):
        """Bytes from the start of all ranges laid end to end, for addresses that lie in the range `number`."""
        return (addresses - self.first[number]).astype(np.int64) + self.start[number]

    def describe(self, address, number):
        """Where an address outside lies, seen from the nearest range below it."""
        if not self.first.size:
            return f"address {int(address):#x}, but there is no tensor argument"
        length = int(self.end[number] - self.first[number])
        return f"{int(address) - int(self.first[number])} bytes into a range of {length}"


def _joined(ranges):
    joined = []
    for first, end in ranges:
        if joined and first < joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([first, end])
    return joined
