"""Other processes on the machine: waits until they are quiet, and marks the samples during which they were not.

From /proc/stat less what the measured processes used themselves. Its clock ticks every 10 ms, so samples are judged in
windows of at least `WINDOW` seconds. Where there is no /proc (macOS) nothing is known and no sample is marked.
"""
import os
import time

WINDOW = 0.1  # seconds
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
# user, nice, system, irq, softirq, steal: all but idle, iowait and guests (which user counts)
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)


def busy_seconds(path="/proc/stat"):
    """CPU time that the whole machine has spent, stolen time included; None where that is unknown."""
    try:
        with open(path) as f:
            ticks = [int(field) for field in f.readline().split()[1:]]
    except OSError:
        return None
    return sum(ticks[i] for i in BUSY_FIELDS) * TICK


QUICK_PATIENCE = (0.3, 3.0)


class Neighbours:
    """Judges windows of samples. limit: cores that others may use. patience: seconds of one wait, and of all."""

    def __init__(self, *, limit=0.1, patience=(2.0, 90.0), busy=busy_seconds):
        self.limit, self.busy = limit, busy
        self.patience, self.remaining = patience
        self.dirty, self.pending = False, []
        self._restart()

    def _restart(self):
        self.pending, self.own = [], 0.0
        self.wall, self.start_busy = time.perf_counter(), self.busy()

    def wait_until_quiet(self):
        """Returns at once when the last window was clean, else once an empty one is, or patience runs out."""
        deadline = time.perf_counter() + min(self.patience, self.remaining)
        while self.dirty and time.perf_counter() < deadline:
            self._restart()
            cpu = time.process_time()
            time.sleep(WINDOW)
            self.own = time.process_time() - cpu
            self.remaining -= time.perf_counter() - self.wall
            self.dirty = self._others_were_busy()
        if not self.pending:
            self._restart()

    def add(self, sample):
        """Takes a sample, with its `cpu_seconds`, into the window, and marks the window's samples once it is over."""
        self.pending.append(sample)
        self.own += sample.cpu_seconds
        if time.perf_counter() - self.wall >= WINDOW:
            self.close()

    def close(self):
        """Ends the window now."""
        self.dirty = self._others_were_busy()
        for sample in self.pending:
            sample.dirty = self.dirty
        self._restart()

    def _others_were_busy(self):
        now = self.busy()
        if now is None:
            return False
        wall = time.perf_counter() - self.wall
        return now - self.start_busy - self.own > self.limit * wall + 2 * TICK
