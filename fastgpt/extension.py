"""Loads the C++ extension, chooses its instruction-set level and its number of threads, and says why."""
import os
import warnings
from pathlib import Path

try:
    from fastgpt import _C
    MISSING = None
except ImportError as error:
    _C = None
    # A checkout shadows an installed fastgpt wherever Python starts in it.
    source = Path(__file__).parents[1]
    cure = f"pip install -e {source}" if (source / "setup.py").exists() else "reinstall fastgpt"
    MISSING = (f"the extension fastgpt._C can't be imported ({error}): it was not built here, or built with "
               f"FASTGPT_BUILD=none; {cure}, with FASTGPT_BUILD=auto")
    del source, cure

LEVELS = ("baseline", "avx2", "avx512")
# The kernels' numbers (csrc/kernels.h, csrc/engine.h), and how many neighbouring keys lie side by side in a page.
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
CACHE_DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
KEY_LANES = 16
LARGEST_PAGE = 1024  # tokens of a page: csrc/cuda/launch_rules.h's reciprocal divides by no more
# Constants, which a compiler that traces a caller can read.
HAS_BF16 = _C is not None and _C.cpu_has_bf16()
HAS_VNNI = _C is not None and _C.cpu_has_vnni()


def _choose_level():
    """The most capable level that this build and this processor have, capped by FASTGPT_CPU_ISA: (name, reason)."""
    cap = os.environ.get("FASTGPT_CPU_ISA")
    if cap is not None and cap not in LEVELS:
        raise ValueError(f"FASTGPT_CPU_ISA={cap!r}: expected one of {', '.join(LEVELS)}")
    if _C is None:
        if cap is not None:
            raise RuntimeError(f"FASTGPT_CPU_ISA={cap}: {MISSING}")
        return None, MISSING
    if cap is None:
        return [name for name in LEVELS if level_refusal(name) is None][-1], "the most capable that can run here"
    refusal = level_refusal(cap)
    if refusal:
        raise RuntimeError(f"FASTGPT_CPU_ISA={cap}: {refusal}; unset it, or cap at a lower level")
    return cap, "FASTGPT_CPU_ISA"


def level_refusal(name):
    """Why a level can't be used here, or None."""
    built, lacking = {n: (b, lacks) for n, b, lacks in _C.levels()}[name]
    if not built:
        return f"this build has no {name} kernels: it is for another architecture"
    return f"the processor lacks {lacking}" if lacking else None


def use_level(name):
    """Switches every CPU kernel to another level: for tests and comparisons."""
    refusal = level_refusal(name)
    if refusal:
        raise RuntimeError(f"level {name}: {refusal}")
    _C.select_level(name)


def usable_cpus(proc="/proc/self"):
    """The processors this process may use: the affinity mask, cut by the cgroup's quota: (count, reason)."""
    if hasattr(os, "sched_getaffinity"):
        count, reason = len(os.sched_getaffinity(0)), "the processors of the affinity mask"
    else:
        count, reason = os.cpu_count() or 1, "the machine's processors"
    quota, path = min(_cgroup_quotas(Path(proc)), default=(None, None))
    if quota is None or quota >= count:
        return count, reason
    return max(1, int(quota)), f"a quota of {quota:g} processors in {path}, of {count} in the affinity mask"


def _cgroup_quotas(proc):
    """The limits (processors' worth of time, the file) of the process's control group and of every group above it."""
    for mount, group, name, read in _cgroups(proc):
        for folder in (group, *group.parents):
            quota = read(folder / name)
            if quota is not None:
                yield quota, str(folder / name)
            if folder == mount:
                break


def _cgroups(proc):
    """(mount point, the process's group below it, limit file, its reader) for each hierarchy that limits the CPU."""
    try:
        mounts = (proc / "mountinfo").read_text().splitlines()
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    except OSError:  # not Linux, or no /proc: no limit to be seen
        return
    for line in mounts:
        fields, _, rest = line.partition(" - ")
        kind, _, options = (rest.split() + ["", "", ""])[:3]
        if kind == "cgroup2":
            mine, limit = [g for _, controllers, g in groups if controllers == ""], ("cpu.max", _read_v2)
        elif kind == "cgroup" and "cpu" in options.split(","):
            mine, limit = [g for _, c, g in groups if "cpu" in c.split(",")], ("cpu.cfs_quota_us", _read_v1)
        else:
            continue
        root, mount = (_unescape(field) for field in fields.split()[3:5])
        for group in mine:
            yield Path(mount), _below(Path(mount), root, group), *limit


def _below(mount, root, group):
    """Where a group lies below the mount of `root`. A container sees its own group as the mount itself."""
    try:
        relative = Path(group).relative_to(root)
    except ValueError:
        return mount
    return mount if ".." in relative.parts else mount / relative


def _unescape(field):
    """mountinfo writes blanks and backslashes as octal escapes."""
    return field.encode("latin-1", "backslashreplace").decode("unicode_escape") if "\\" in field else field


def _read_v2(path):
    """A quota and its period in microseconds, or "max" and a period -> processors; None without a limit."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):  # the root group has no such file, and a container may not see those above its own
        return None


def _read_v1(path):
    try:
        quota, period = int(path.read_text()), int(path.with_name("cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period
    except (OSError, ValueError):
        return None


def set_num_threads(count):
    """Sets the number of threads of the CPU kernels (PyTorch's own ops have torch.set_num_threads).

    count: 1 to 1024. Raises RuntimeError without the extension.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise ValueError(f"set_num_threads: count must be an int from 1 to 1024, got {count!r}")
    if _C is None:
        raise RuntimeError(f"set_num_threads: {MISSING}")
    _C.set_threads(count)


def get_num_threads():
    """The number of threads of the CPU kernels, the calling thread among them; 1 without the extension."""
    return _C.threads() if _C is not None else 1


LEVEL, LEVEL_REASON = _choose_level()
if _C is None:
    THREADS_REASON = "there is no extension"
    warnings.warn(f"fastgpt runs on its PyTorch reference, slower: {MISSING}", stacklevel=2)
else:
    _C.select_level(LEVEL)
    _threads, THREADS_REASON = usable_cpus()
    set_num_threads(min(_threads, 1024))
