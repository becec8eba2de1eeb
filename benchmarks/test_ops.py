"""Each op and PyTorch's own, at GPT-2's shapes; the accuracy rule comes first."""
from functools import lru_cache

import pytest

from benchmarks import cases
from benchmarks.bench_ops import Subject

pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=3)
# bfloat16 forward only: PyTorch's backward takes seconds where the processor has no such instructions.
SUBJECTS = [(case, dtype) for case in cases.all_cases() for dtype in case.targets
            if dtype == "float32" or case.what == cases.FORWARD]
subject_of = lru_cache(maxsize=1)(Subject)


@pytest.mark.parametrize("variant", ["fastgpt", "pytorch"])
@pytest.mark.parametrize(("case", "dtype"), SUBJECTS, ids=[f"{case.key}, {dtype}" for case, dtype in SUBJECTS])
def test_op(benchmark, threads, case, dtype, variant):
    benchmark.group = f"{case.key}, {dtype}, {threads} threads"
    subject = subject_of(case, dtype)
    contestant = subject.ours() if variant == "fastgpt" else subject.theirs(threads, float("inf"))
    if contestant.check is not None:
        contestant.check()
    benchmark(contestant.run)
