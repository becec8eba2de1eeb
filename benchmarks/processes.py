"""Contestants in processes of their own: for peak memory, other thread settings, rivals in other environments.

A child makes a `Parent` and serves it; the parent holds it as a `Process` and passes it to `timing.compare` beside the
others. The child is idle between its turns. Messages are JSON lines: the child's first one says that it is ready, each
later one answers a "go". Standard library only: a child may be run by any Python.
"""
import contextlib
import json
import os
import select
import subprocess
import sys
import time

from benchmarks.timing import Failure, Sample, TooSlow


class Process:
    """A contestant that `command` starts. limit: seconds of its start, and of each step. head: its first message.

    env: what is added to this process's environment, and, where a value is None, taken from it. log: the file to which
    it adds what the child prints, which goes to this process's stderr otherwise.
    """

    def __init__(self, name, command, *, env=None, limit=600.0, log=None):
        self.name, self.command, self.limit, self.head = name, command, limit, None
        self.env = {key: value for key, value in {**os.environ, **(env or {})}.items() if value is not None}
        self.log, self.child = log, None

    def prepare(self):
        with open(self.log, "ab") if self.log else contextlib.nullcontext() as log:
            self._start(log)
        self.head = self._read()

    def _start(self, log):
        try:
            self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                          env=self.env)
        except OSError as error:
            raise Failure(f"{self.command[0]} can't be started: {error.strerror}") from None

    def sample(self, evict=None):
        """One step of the child, timed by itself. Its caches are as cold as the contestants before have left them."""
        try:
            self.child.stdin.write(b"go\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise Failure(f"died with exit status {self.child.wait()}") from None
        reply = self._read()
        return Sample(reply.pop("seconds"), reply.pop("cpu_seconds"), reply)

    def _read(self):
        line, deadline = b"", time.monotonic() + self.limit
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close(kill=True)
                raise TooSlow(f"took more than the limit of {self.limit:g} s")
            piece = os.read(self.child.stdout.fileno(), 1 << 16)
            if not piece:
                raise Failure(f"died with exit status {self.child.wait()}")
            line += piece
        message = json.loads(line)
        if "failed" in message:
            raise Failure(message["failed"])
        return message

    def close(self, kill=False):
        if self.child is None:
            return
        if kill:
            self.child.kill()
        for stream in (self.child.stdin, self.child.stdout):
            try:
                stream.close()
            except BrokenPipeError:
                continue  # it has died, with a request unread
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


class Parent:
    """The child's end. Made first of all: what anything prints later goes to stderr, not between the messages."""

    def __init__(self):
        self.replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def refuse(self, reason):
        """Says why this child can't take part, or no longer."""
        self._send({"failed": reason})

    def serve(self, step, **head):
        """Says that the child is ready, then runs step() -> dict of values (or None) whenever it is asked to."""
        self._send(head)
        for request in sys.stdin:
            if request.strip() != "go":
                raise ValueError(f"expected 'go', got {request!r}")
            cpu, start = time.process_time(), time.perf_counter()
            values = step() or {}
            seconds = time.perf_counter() - start
            self._send({"seconds": seconds, "cpu_seconds": time.process_time() - cpu, **values})

    def _send(self, message):
        self.replies.write(json.dumps(message) + "\n")
        self.replies.flush()


def memory_mb(field="VmHWM"):
    """A figure of this process in MB: VmHWM is its peak, VmRSS what it holds now. None where there is no /proc."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field + ":"))
    except OSError:
        return None


def reset_peak():
    """Sets VmHWM back to what the process holds now. -> Whether the kernel let us."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True
