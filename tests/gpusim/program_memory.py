"""Checks of the memory accesses of interpreted programs: bounds, and races between programs."""
import numpy as np
from extents import Extents

NOBODY, SEVERAL = -1, -2


class SimulationError(AssertionError):
    """What an interpreted kernel did wrong."""


class ProgramMemory:
    """The tensor arguments of one launch: who stored and who loaded each element, known by its first byte.

    A race is an element that one program stores and another one loads or stores, or that two lanes of one program
    store. Atomics are held to the bounds only: a kernel that synchronises by them is to be run without race checks.
    """

    def __init__(self, tensors, bounds, races):
        self.extents = Extents(tensors)
        self.bounds, self.races = bounds, races and self.extents.bytes > 0
        self.program, self.position = 0, (0, 0, 0)
        if self.races:
            self.storer, self.loader = (np.full(self.extents.bytes, NOBODY, np.int32) for _ in range(2))
            self.lane = np.empty(self.extents.bytes, np.int32)

    def enter(self, program, position):
        """The accesses from here on are those of the program with this number, at this place in the grid."""
        self.program, self.position = program, position

    def load(self, pointers, mask, size):
        offsets = self._offsets(pointers, mask, size, "load")
        if not self.races or not offsets.size:
            return
        storer = self.storer[offsets]
        others = storer[(storer != NOBODY) & (storer != self.program)]
        if others.size:
            raise SimulationError(f"race: program {self.position} loads what program number {others[0]} stored")
        loader = self.loader[offsets]
        alone = (loader == NOBODY) | (loader == self.program)
        self.loader[offsets] = np.where(alone, self.program, SEVERAL)

    def store(self, pointers, mask, size):
        offsets = self._offsets(pointers, mask, size, "store")
        if not self.races or not offsets.size:
            return
        for table, verb in ((self.storer, "stored"), (self.loader, "loaded")):
            known = table[offsets]
            if ((known != NOBODY) & (known != self.program)).any():
                raise SimulationError(f"race: program {self.position} stores what another program {verb}")
        self.storer[offsets] = self.program
        lanes = np.arange(offsets.size, dtype=np.int32)
        self.lane[offsets] = lanes
        if (self.lane[offsets] != lanes).any():
            raise SimulationError(f"race: two lanes of program {self.position} store to one address")

    def atomic(self, pointers, mask, size):
        self._offsets(pointers, mask, size, "atomic")

    def _offsets(self, pointers, mask, size, what):
        """Offsets of the active lanes' elements among the arguments."""
        pointers = pointers.ravel() if mask is None else np.broadcast_to(pointers, mask.shape)[mask]
        if not pointers.size or not (self.bounds or self.races):
            return pointers
        number, inside = self.extents.locate(pointers, size)
        if inside.all():
            return self.extents.offset(pointers, number)
        if not self.bounds:
            return self.extents.offset(pointers[inside], number[inside])
        outside = np.flatnonzero(~inside)
        place = self.extents.describe(pointers[outside[0]], number[outside[0]])
        raise SimulationError(f"{what} outside every argument: program {self.position}, {outside.size} of "
                              f"{pointers.size} lanes, the first {place}")
