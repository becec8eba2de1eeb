"""The thread pool: a stress test in C++ under the sanitizers, and how it behaves in a Python process."""
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from processes import run_python

from fastgpt import ops
from fastgpt import extension

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT / "tests" / "pool_stress.cpp"), str(ROOT / "csrc" / "cpu" / "pool.cpp")]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
needs_extension = pytest.mark.skipif(bool(extension.MISSING), reason=str(extension.MISSING))


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
# The locks of the address and thread sanitizers do not survive a fork.
@pytest.mark.parametrize("sanitizers, arguments", [("undefined", ["1", "fork"]), ("address", ["1"]), ("thread", ["2"])],
                         ids=["fork", "address", "thread"])
def test_stress(sanitizers, arguments, tmp_path):
    program = str(tmp_path / "stress")
    build = [*COMPILER.split(), "-std=c++17", "-O1", "-pthread", f"-fsanitize={sanitizers}", *SOURCES, "-o", program]
    compiled = subprocess.run(build, capture_output=True, text=True, check=False)
    if "sanitizer" in compiled.stderr or "cannot find -l" in compiled.stderr:
        pytest.skip(f"the compiler has no -fsanitize={sanitizers}")
    assert compiled.returncode == 0, compiled.stderr
    options = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False,
                            env={**os.environ, **options})
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not know this system's memory layout")
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


def norm(rows=512):
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0))
    return lambda: ops.layer_norm(x, torch.ones(96))


@pytest.fixture
def threads():
    before = extension.get_num_threads()
    extension.set_num_threads(3)
    yield
    extension.set_num_threads(before)


@needs_extension
def test_python_threads_at_once(threads):
    call, wrong = norm(), []
    expected = call()

    def user():
        wrong.extend(1 for _ in range(200) if not torch.equal(call(), expected))

    users = [threading.Thread(target=user) for _ in range(4)]
    for user_thread in users:
        user_thread.start()
    for count in (1, 4, 2, 3):
        extension.set_num_threads(count)
    for user_thread in users:
        user_thread.join()
    assert not wrong


FORK = """
import os, signal, threading, torch, fastgpt
from fastgpt import ops
torch.set_num_threads(1)
fastgpt.set_num_threads(3)
x, weight = torch.randn(512, 96), torch.ones(96)
expected = ops.layer_norm(x, weight)
running = True
def user():
    while running:
        ops.layer_norm(x, weight)
thread = threading.Thread(target=user)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        right = all(torch.equal(ops.layer_norm(x, weight), expected) for _ in range(20))
        os._exit(0 if right and fastgpt.get_num_threads() == 3 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
running = False
thread.join()
print("ok")
"""


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_the_workers_run():
    result = run_python(FORK)
    assert result.stdout == "ok\n", result.stderr


FEW = """
import resource, torch, fastgpt
from fastgpt import ops
torch.set_num_threads(1)
x, weight = torch.randn(512, 96), torch.ones(96)
expected = ops.layer_norm(x, weight)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
fastgpt.set_num_threads(1000)
assert torch.equal(ops.layer_norm(x, weight), expected)
print(fastgpt.get_num_threads())
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits")
def test_a_system_that_gives_fewer_threads():
    result = run_python(FEW)
    assert result.returncode == 0 and 1 <= int(result.stdout) < 1000, result.stderr


def rate(call, seconds=0.15):
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="stops and continues a process by signals")
def test_beside_a_busy_process_at_least_half_of_the_speed_remains(threads):
    """With a thread for every processor; the best of some rounds, since the machine may have other work as well."""
    cpus = extension.usable_cpus()[0]
    if cpus < 2:
        pytest.skip("one processor: the fair share is a half")
    extension.set_num_threads(cpus)
    call = norm(rows=64 * cpus)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        best = 0.0
        for _ in range(12):
            busy.send_signal(signal.SIGSTOP)
            alone = rate(call)
            busy.send_signal(signal.SIGCONT)
            best = max(best, rate(call) / alone)
            if best >= 0.5:
                break
    finally:
        busy.kill()
        busy.wait()
    assert best >= 0.5
