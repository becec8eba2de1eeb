"""Where the threads of the blocks that run together are in the program."""
import numpy as np
from ptx_parser import PtxError

WAITING = 1 << 40
GONE = 1 << 50


class ControlFlow:
    """Program counters of all threads. Those with the lowest run first, so that they meet again after a branch.

    alive: the threads that there are; blocks: the number of blocks in which they lie one after another. on_barrier: called
    with the blocks, as flags, all of whose threads have reached one. A counter is WAITING higher where its thread waits at
    a barrier for others of its block, and GONE when it has left.
    """

    def __init__(self, alive, blocks, on_barrier):
        self.alive, self.left = alive, np.count_nonzero(alive)
        self.blocks, self.on_barrier = blocks, on_barrier
        self.together, self.counter, self.counters = True, 0, None
        self.finishes = {}

    def current(self):
        """(counter, mask of the threads to run) of the next instruction, or None when all threads are done."""
        if not self.left:
            return None
        if not self.together:
            counter = int(self.counters.min())
            mask = self.counters == counter
            if np.count_nonzero(mask) < self.left:
                return counter, mask
            self.together, self.counter = True, counter
        return self.counter, self.alive

    def advance(self, mask):
        if self.together:
            self.counter += 1
        else:
            self.counters += mask

    def branch(self, mask, taking, target):
        taken = np.count_nonzero(taking)
        if self.together and taken in (0, self.left):
            self.counter = target if taken else self.counter + 1
            return
        self._separate()
        self.counters += mask
        self.counters[taking] = target

    def exit(self, mask, leaving):
        self._separate()
        self.counters += mask
        self.counters[leaving] = GONE
        self.alive = self.alive & ~leaving
        self.left = np.count_nonzero(self.alive)
        self._release()

    def barrier(self, mask, arriving, finish=lambda released: None):
        """finish: what is done, of all the threads that are left of a block, when all have reached the barrier."""
        if not arriving.any():
            self.advance(mask)
            return
        self._separate()
        self.counters += mask
        counters = self.counters[arriving]
        self.finishes[counters[0]] = finish
        self.counters[arriving] = counters + WAITING
        self._release()

    def _release(self):
        """Lets the blocks go on whose threads all wait."""
        counters = self.counters.reshape(self.blocks, -1)
        waiting = (counters >= WAITING) & (counters < GONE)
        ready = waiting.any(1) & (counters >= WAITING).all(1)
        if not ready.any():
            return
        released = waiting & ready[:, None]
        counter = counters.max(1, initial=0, where=released)
        if (released & (counters != counter[:, None])).any():
            raise PtxError("divergent bar.sync: the threads of the block wait at different ones")
        self.on_barrier(ready)
        for place in np.unique(counter[ready]):
            self.finishes[place - WAITING]((released & (counter == place)[:, None]).ravel())
        counters[released] -= WAITING

    def _separate(self):
        if self.together:
            self.counters = np.where(self.alive, self.counter, GONE)
            self.together = False
