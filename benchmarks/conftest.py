"""`pytest benchmarks` times every op and the model with pytest-benchmark and keeps the JSON under .benchmarks/.

Each variant is timed alone, one after the other: for a history of one's own figures. Ratios come from bench_*.py.
"""
import pytest

from benchmarks.threads import thread_counts, use_threads


def pytest_configure(config):
    config.option.benchmark_autosave = True
    config.option.benchmark_max_time = "0.2"  # seconds for each test
    config.option.benchmark_min_rounds = 3
    config.option.benchmark_group_by = "group"


@pytest.fixture(params=thread_counts()[-1:], ids=lambda n: f"{n} threads")
def threads(request):
    with use_threads(request.param):
        yield request.param
