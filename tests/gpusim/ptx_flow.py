"""Where the threads of a block are in the program."""
import numpy as np
from ptx_parser import PtxError


class ControlFlow:
    """Program counters of a block's threads. Those with the lowest run first, so that they meet again after a branch.

    end: the number of instructions; on_barrier: called whenever all threads have reached one.
    """

    def __init__(self, everyone, end, on_barrier):
        self.everyone, self.end, self.on_barrier = everyone, end, on_barrier
        self.together, self.counter = True, 0
        self.counters = np.zeros(everyone.size, np.int64)
        self.alive, self.waiting = everyone.copy(), ~everyone
        self.finish = None

    def current(self):
        """(counter, mask of the threads to run) of the next instruction, or None when all threads are done."""
        if self.together:
            return (self.counter, self.everyone) if self.counter < self.end else None
        while self.alive.any():
            running = self.alive & ~self.waiting
            if not running.any():
                self._release()
                return self.current()
            counter = int(self.counters[running].min())
            mask = running & (self.counters == counter)
            if counter < self.end:
                return counter, mask
            self.alive[mask] = False
        return None

    def advance(self, mask):
        if self.together:
            self.counter += 1
        else:
            self.counters[mask] += 1
            self._join()

    def branch(self, mask, taking, target):
        if self.together and taking.all():
            self.counter = target
            return
        if self.together and not taking.any():
            self.counter += 1
            return
        self._separate()
        self.counters[mask] += 1
        self.counters[taking] = target
        self._join()

    def exit(self, mask, leaving):
        self._separate()
        self.counters[mask] += 1
        self.alive[leaving] = False

    def barrier(self, mask, arriving, finish=lambda alive: None):
        """finish: what is done, of all the threads that are left, when all have reached the barrier."""
        self.finish = finish
        if self.together and arriving.all():
            self.on_barrier()
            finish(self.everyone)
            self.counter += 1
        elif not arriving.any():
            self.advance(mask)
        else:
            self._separate()
            self.waiting[arriving] = True
            self.counters[mask & ~arriving] += 1

    def _release(self):
        counters = self.counters[self.alive]
        if (counters != counters[0]).any():
            raise PtxError("divergent bar.sync: the threads of the block wait at different ones")
        self.waiting[:] = False
        self.counters[self.alive] += 1
        self.on_barrier()
        self.finish(self.alive)
        self._join()

    def _separate(self):
        if self.together:
            self.counters[:] = self.counter
            self.together = False

    def _join(self):
        if self.alive.all() and not self.waiting.any() and (self.counters == self.counters[0]).all():
            self.together, self.counter = True, int(self.counters[0])
