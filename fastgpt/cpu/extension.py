"""Loads the C++ extension, chooses its instruction-set level and its number of threads, and says why."""
import os
import warnings
from pathlib import Path

try:
    from fastgpt import _C
    MISSING = None
except ImportError as error:
    _C = None
    MISSING = f"the extension fastgpt._C is not there ({error}); reinstall with FASTGPT_BUILD=auto"

LEVELS = ("baseline", "avx2", "avx512")


def _choose_level():
    """The most capable level that this build and this processor have, capped by FASTGPT_CPU_ISA: (name, reason)."""
    cap = os.environ.get("FASTGPT_CPU_ISA")
    if cap is None:
        name = [name for name, _, _ in _C.levels() if level_refusal(name) is None][-1]
        return name, "the most capable that the processor has"
    if cap not in LEVELS:
        raise ValueError(f"FASTGPT_CPU_ISA={cap!r}: expected one of {', '.join(LEVELS)}")
    refusal = level_refusal(cap)
    if refusal:
        raise RuntimeError(f"FASTGPT_CPU_ISA={cap}: {refusal}")
    return cap, "FASTGPT_CPU_ISA"


def level_refusal(name):
    """Why a level can't be used here, or None."""
    built, supported = {n: (b, s) for n, b, s in _C.levels()}[name]
    if not built:
        return f"this build has no {name} kernels (it is for another architecture)"
    return None if supported else f"the processor has no {name}"


def use_level(name):
    """Switches every CPU kernel to another level: for tests and comparisons."""
    refusal = level_refusal(name)
    if refusal:
        raise RuntimeError(f"level {name}: {refusal}")
    _C.select_level(name)


def usable_cpus():
    """The processors this process may use: the affinity mask, cut by the cgroup's quota: (count, reason)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    if quota is not None and quota < count:
        return max(1, int(quota)), f"a cgroup quota of {quota:g} processors"
    return count, "the affinity mask"


def _cgroup_quota():
    """The processors' worth of time that the control group allows (version 2, then 1), or None without a limit."""
    quotas = [_read_quota(path, version) for path, version in _quota_files()]
    return min((q for q in quotas if q is not None), default=None)


def _quota_files(root="/sys/fs/cgroup", membership="/proc/self/cgroup"):
    """The limits of the process's own group and of every group above it: the smallest one holds."""
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name, version = Path(root), "cpu.max", 2
        elif "cpu" in controllers.split(","):
            base, name, version = Path(root, "cpu"), "cpu.cfs_quota_us", 1
        else:
            continue
        folder = base / group.lstrip("/")
        while True:
            yield folder / name, version
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def _read_quota(path, version):
    try:
        if version == 2:
            quota, period = path.read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        quota, period = int(path.read_text()), int(path.with_name("cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period
    except (OSError, ValueError):  # no such file: no limit at this level
        return None


def set_num_threads(count):
    """The number of threads of the CPU kernels (not of PyTorch's own ops)."""
    if not isinstance(count, int) or not 1 <= count <= 1024:
        raise ValueError(f"set_num_threads: expected an int from 1 to 1024, got {count!r}")
    if _C is not None:
        _C.set_threads(count)


def get_num_threads():
    return _C.threads() if _C is not None else 1


if _C is None:
    LEVEL, LEVEL_REASON = None, MISSING
    warnings.warn(f"fastgpt runs on its PyTorch reference, slower: {MISSING}", stacklevel=2)
else:
    LEVEL, LEVEL_REASON = _choose_level()
    _C.select_level(LEVEL)
    set_num_threads(usable_cpus()[0])
