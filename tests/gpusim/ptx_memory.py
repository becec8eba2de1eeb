"""Global and shared memory as PTX sees them, with checks of bounds, alignment and races."""
import ctypes

import numpy as np
from extents import Extents
from ptx_parser import PtxError

SHARED_WINDOW, PARAMETER_WINDOW = np.uint64(1 << 56), 1 << 57
PARAMETER_ALIGNMENT = 16
UNWRITTEN = 0xFF
NOBODY, SEVERAL = -1, -2


class GlobalMemory:
    """The bytes of the tensor arguments, in place.

    writers: of each byte the number of the block that has stored it in this launch. Blocks run in any order, so what one has
    stored no other may load; atomics (without `blocks`) are not held to that.
    """

    def __init__(self, tensors):
        self.extents = Extents(tensors)
        sizes = zip(self.extents.first.tolist(), self.extents.end.tolist())
        self.ranges = [np.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), np.uint8)
                       for first, end in sizes]
        self.writers = [None] * len(self.ranges)

    def read(self, addresses, size, blocks=None, what="load"):
        """uint8 array (addresses, size). blocks: the number of each address's."""
        data = np.empty((addresses.size, size), np.uint8)
        for lanes, number, index in self._places(addresses, size, what):
            data[lanes] = self.ranges[number][index]
            if blocks is not None and self.writers[number] is not None:
                writers = self.writers[number][index]
                if ((writers != NOBODY) & (writers != blocks[lanes][:, None])).any():
                    raise PtxError(f"race between blocks: {what} of what another one has stored")
        return data

    def write(self, addresses, data, blocks=None, what="store"):
        for lanes, number, index in self._places(addresses, data.shape[1], what):
            self.ranges[number][index] = data[lanes]
            if blocks is not None:
                if self.writers[number] is None:
                    self.writers[number] = np.full(self.ranges[number].size, NOBODY, np.int32)
                self.writers[number][index] = blocks[lanes][:, None]

    def _places(self, addresses, size, what):
        """(which addresses, range, indices of their bytes in it) for each range that they fall into."""
        number, inside = self.extents.locate(addresses, size)
        if not inside.all():
            outside = np.flatnonzero(~inside)
            place = self.extents.describe(addresses[outside[0]], number[outside[0]])
            raise PtxError(f"{what} of {size} bytes outside every argument: {outside.size} lanes, the first {place}")
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"misaligned {what} of {size} bytes")
        for found in np.unique(number):
            lanes = slice(None) if number[0] == found and (number == found).all() else number == found
            offsets = (addresses[lanes] - self.extents.first[found]).astype(np.int64)
            yield lanes, found, offsets[:, None] + np.arange(size)


class Parameters:
    """The bytes of the parameters, given by name, in a window of their own. addresses: name -> where its bytes begin."""

    def __init__(self, values):
        self.addresses, self.bytes = {}, np.empty(0, np.uint8)
        for name, value in values.items():
            self.addresses[name] = PARAMETER_WINDOW + self.bytes.size
            padding = bytes(-len(value) % PARAMETER_ALIGNMENT)
            self.bytes = np.concatenate([self.bytes, np.frombuffer(value + padding, np.uint8)])

    def read(self, addresses, size):
        offsets = (addresses - np.uint64(PARAMETER_WINDOW)).astype(np.int64)
        if offsets.min() < 0 or offsets.max() + size > self.bytes.size:
            raise PtxError(f"load outside the {self.bytes.size} bytes of parameters")
        return self.bytes[offsets[:, None] + np.arange(size)]


class SharedMemory:
    """The shared memory of blocks, one behind another. Bytes never written are NaN in each float format.

    A race is a byte that one warp writes and another one touches in the same epoch of their block: with no barrier between.
    It is noticed by the granule: two bytes, or one where `fine`. `pinned` granules are being read by an unfinished wgmma.
    size: of a block's bytes; warps: of a block, which are numbered through all the blocks.
    """

    def __init__(self, size, blocks, warps, races, fine):
        self.size, self.warps, self.races, self.granule = size, warps, races, 1 if fine else 2
        self.granules_of_block = size // self.granule + 1
        granules = blocks * self.granules_of_block
        self.bytes, self.epoch = np.empty(granules * self.granule, np.uint8), np.empty(blocks, np.int32)
        self.write_epoch, self.writer, self.read_epoch, self.reader, self.pinned = np.empty((5, granules), np.int32)
        self.reset()

    def reset(self):
        self.bytes.fill(UNWRITTEN)
        self.write_epoch.fill(NOBODY)
        self.read_epoch.fill(NOBODY)
        self.pinned.fill(0)
        self.epoch.fill(0)

    def next_epoch(self, blocks):
        """A barrier in some blocks: what went before it is in order with what comes after."""
        self.epoch[blocks] += 1

    def index(self, addresses, size, warps, what):
        """Indices (addresses, size) of the bytes at addresses of the shared or the generic window, as these warps see it."""
        offsets = np.where(addresses >= SHARED_WINDOW, addresses - SHARED_WINDOW, addresses).astype(np.int64)
        if offsets.size and (offsets.min() < 0 or offsets.max() + size > self.size):
            raise PtxError(f"shared {what} outside the {self.size} bytes of shared memory")
        if (offsets % size).any():
            raise PtxError(f"misaligned shared {what} of {size} bytes")
        return (offsets + warps // self.warps * (self.granules_of_block * self.granule))[:, None] + np.arange(size)

    def read(self, index, warps, what="load"):
        """The bytes at an index; warps: who reads each of its rows."""
        if self.races:
            granules, warps = self.granules(index), warps[:, None]
            self._refuse_written(granules, warps, what)
            epoch = self._epoch(granules)
            shared = (self.read_epoch[granules] == epoch) & (self.reader[granules] != warps)
            self.reader[granules] = np.where(shared, SEVERAL, warps)
            self.read_epoch[granules] = epoch
        return self.bytes[index]

    def write(self, index, data, warps, what="store"):
        if self.races:
            granules, warps = self.granules(index), warps[:, None]
            self._refuse_written(granules, warps, what)
            self.refuse_overwrite(index, warps[:, 0], what)
            self.write_epoch[granules] = self._epoch(granules)
            self.writer[granules] = warps
        self.bytes[index] = data

    def refuse_overwrite(self, index, warps, what):
        """Raises when another warp, or a wgmma, may still be reading what is about to be written."""
        if not self.races:
            return
        granules = self.granules(index)
        if ((self.read_epoch[granules] == self._epoch(granules)) & (self.reader[granules] != warps[:, None])).any():
            raise PtxError(f"race in shared memory: {what} over what another warp read, no barrier between")
        if self.pinned[granules].any():
            raise PtxError(f"race in shared memory: {what} over what an unwaited wgmma reads")

    def pin(self, granules):
        self.pinned[granules] += 1

    def unpin(self, granules):
        """The reader has waited. Its other warps may not have: to them, too, a barrier must pass before a store."""
        self.pinned[granules] -= 1
        self.read_epoch[granules] = self._epoch(granules)
        self.reader[granules] = SEVERAL

    def granules(self, index):
        """The granules of an index's bytes, row by row."""
        return index if self.granule == 1 else index[:, ::2] >> 1

    def _epoch(self, granules):
        """That of the block in which each row lies."""
        return self.epoch[granules[:, :1] // self.granules_of_block]

    def _refuse_written(self, granules, warps, what):
        if ((self.write_epoch[granules] == self._epoch(granules)) & (self.writer[granules] != warps)).any():
            raise PtxError(f"race in shared memory: {what} after another warp's store, no barrier between")


class AsynchronousCopies:
    """cp.async: a copy's bytes are fetched when it is issued and land when its group is waited for.

    groups: how many each warp has committed; issued: (index, data, the warp of each row, its group's number).
    """

    def __init__(self, shared, warps):
        self.shared, self.groups = shared, np.empty(warps, np.int64)
        self.reset()

    def reset(self):
        self.groups.fill(0)
        self.issued = []

    def issue(self, index, data, warps):
        self.shared.refuse_overwrite(index, warps, "cp.async")
        self.issued.append((index, data, warps, self.groups[warps]))

    def commit(self, warps):
        self.groups[warps] += 1

    def wait(self, warps, pending):
        """Lands all but the `pending` latest groups of these warps."""
        due = np.zeros_like(self.groups)
        due[warps] = self.groups[warps] - pending
        issued, self.issued = self.issued, []
        for copies in issued:
            _, _, owners, groups = copies
            lands = groups < due[owners]
            if lands.any():
                self.shared.write(*(rows[lands] for rows in copies[:3]), "cp.async")
            if not lands.all():
                self.issued.append(tuple(rows[~lands] for rows in copies))
