"""`pytest benchmarks` times every op and the model with pytest-benchmark and keeps the JSON under .benchmarks/.

Each variant is timed alone, one after the other: for a history of one's own figures. Ratios come from bench_*.py.
"""
import time

import pytest

from benchmarks.machine import describe
from benchmarks.threads import thread_counts, use_threads


def pytest_configure(config):
    if not config.option.benchmark_save:
        config.option.benchmark_save = f"{describe()['commit'] or 'unknown'}_{time.strftime('%Y%m%d_%H%M%S')}"


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastgpt"] = describe()


@pytest.fixture(params=thread_counts()[-1:], ids=lambda n: f"{n} threads")
def threads(request):
    with use_threads(request.param):
        yield request.param
