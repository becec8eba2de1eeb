"""The gate of the benchmarks: the tests' one accuracy rule, tests/numerics.py."""
import sys

from benchmarks.machine import ROOT

sys.path.append(str(ROOT / "tests"))
from numerics import GRADIENTS, VALUES, assert_accurate


def check_results(names, actual, truth, pytorch):
    """Raises AssertionError naming the tensor when a result is less accurate than the rule allows."""
    for name, *values in zip(names, actual, truth, pytorch, strict=True):
        assert_accurate(name, *values, GRADIENTS if name.startswith("gradient") else VALUES)
