"""The choice of the instruction-set level and of the number of threads, each with its reason."""
import os
from pathlib import Path

import pytest
import torch
from processes import run_python

from fastgpt import extension

needs_extension = pytest.mark.skipif(bool(extension.MISSING), reason=str(extension.MISSING))
ALL_RUN = [("baseline", True, None), ("avx2", True, None), ("avx512", True, None)]


class FakeExtension:
    """Stands for another build on another processor."""

    def __init__(self, levels):
        self.levels = lambda: levels


# Levels

CAPPED = """
import torch
from fastgpt import ops
from fastgpt import extension
x = torch.arange(40.0).reshape(2, 20)
torch.testing.assert_close(ops.layer_norm(x, torch.ones(20)), torch.nn.functional.layer_norm(x, (20,)))
assert ops.resolve("layer_norm", x)[0] == "cpp"
print(extension._C.active_level(), extension.LEVEL, extension.LEVEL_REASON)
"""


@needs_extension
def test_the_variable_caps_the_level(level):
    result = run_python(CAPPED, FASTGPT_CPU_ISA=level)
    assert result.stdout.split() == [level, level, "FASTGPT_CPU_ISA"], result.stderr


@pytest.mark.parametrize("name", ["avx", "AVX2", "", "native"])
def test_unknown_levels_are_refused(name, monkeypatch):
    monkeypatch.setenv("FASTGPT_CPU_ISA", name)
    with pytest.raises(ValueError, match=f"FASTGPT_CPU_ISA={name!r}: expected one of baseline, avx2, avx512"):
        extension._choose_level()


@needs_extension
def test_a_level_that_cannot_run_is_refused():
    impossible = [name for name in extension.LEVELS if extension.level_refusal(name)]
    if not impossible:
        pytest.skip("this processor has every level")
    result = run_python("import fastgpt.cpu", FASTGPT_CPU_ISA=impossible[-1])
    message = f"RuntimeError: FASTGPT_CPU_ISA={impossible[-1]}: {extension.level_refusal(impossible[-1])}; unset it"
    assert result.returncode and message in result.stderr
    with pytest.raises(RuntimeError, match=f"level {impossible[-1]}: "):
        extension.use_level(impossible[-1])
    assert not extension._C.select_level(impossible[-1]) and not extension._C.select_level("avx1024")
    assert extension._C.active_level() == extension.LEVEL


@pytest.mark.parametrize("cap, lacking, built, expected", [
    (None, {}, 3, "avx512"), (None, {"avx512": "avx512vl"}, 3, "avx2"), (None, {}, 1, "baseline"),
    ("avx2", {}, 3, "avx2"), ("avx512", {"avx512": "avx512vl"}, 3, "the processor lacks avx512vl"),
    ("avx2", {}, 1, "this build has no avx2 kernels: it is for another architecture"),
])
def test_the_level_on_other_machines(cap, lacking, built, expected, monkeypatch):
    levels = [(name, i < built, lacking.get(name)) for i, name in enumerate(extension.LEVELS)]
    monkeypatch.setattr(extension, "_C", FakeExtension(levels))
    monkeypatch.delenv("FASTGPT_CPU_ISA", raising=False)
    if cap:
        monkeypatch.setenv("FASTGPT_CPU_ISA", cap)
    if expected in extension.LEVELS:
        assert extension._choose_level()[0] == expected
    else:
        with pytest.raises(RuntimeError, match=f"FASTGPT_CPU_ISA={cap}: {expected}"):
            extension._choose_level()


def test_a_level_without_the_extension_is_refused(monkeypatch):
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(extension, "MISSING", "it is not there")
    monkeypatch.delenv("FASTGPT_CPU_ISA", raising=False)
    assert extension._choose_level() == (None, "it is not there")
    monkeypatch.setenv("FASTGPT_CPU_ISA", "baseline")
    with pytest.raises(RuntimeError, match="FASTGPT_CPU_ISA=baseline: it is not there"):
        extension._choose_level()


@needs_extension
def test_widths_and_features(level):
    assert extension._C.active_level() == level
    assert extension._C.vector_width() in {"baseline": (4,), "avx2": (8, 16), "avx512": (16,)}[level]
    if os.path.exists("/proc/cpuinfo"):
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n")[0].split()
        assert extension.HAS_BF16 == ("avx512_bf16" in flags)
        assert extension.HAS_VNNI == ("avx512_vnni" in flags)


# Threads


class Machine:
    """A fake /proc/self and the control groups that it names."""

    def __init__(self, folder, mounts, groups):
        self.folder, self.proc = folder, folder / "proc"
        self.proc.mkdir()
        lines = [f"{30 + i} 23 0:{i} {root} {folder}{point} rw,relatime shared:{i} - {kind} {kind} {options}"
                 for i, (root, point, kind, options) in enumerate(mounts)]
        (self.proc / "mountinfo").write_text("\n".join(lines) + "\n")
        (self.proc / "cgroup").write_text("\n".join(groups) + "\n")

    def limit(self, group, **files):
        (self.folder / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.folder / group / name.replace("_", ".", 1)).write_text(text + "\n")
        return self

    def quotas(self):
        return sorted(quota for quota, _ in extension._cgroup_quotas(self.proc))


V2 = ("/", "/cg", "cgroup2", "rw,nsdelegate")
V1 = ("/", "/cg/cpu", "cgroup", "rw,cpu,cpuacct")


def test_version_2_of_control_groups(tmp_path):
    machine = Machine(tmp_path, [V2], ["0::/user/app"])
    machine.limit("cg/user/app", cpu_max="max 100000").limit("cg/user", cpu_max="250000 100000").limit("cg")
    assert machine.quotas() == [2.5]


def test_the_tightest_of_nested_groups_holds(tmp_path):
    machine = Machine(tmp_path, [V2], ["0::/a/b"])
    machine.limit("cg/a/b", cpu_max="300000 100000").limit("cg/a", cpu_max="50000 100000")
    assert machine.quotas() == [0.5, 3.0]


def test_a_container_that_sees_its_group_as_the_root(tmp_path):
    assert Machine(tmp_path, [V2], ["0::/"]).limit("cg", cpu_max="150000 100000").quotas() == [1.5]


def test_a_container_without_a_namespace_sees_the_hosts_path(tmp_path):
    mount = ("/docker/abc", "/cg", "cgroup2", "rw")
    machine = Machine(tmp_path, [mount], ["0::/docker/abc/job"])
    machine.limit("cg/job", cpu_max="200000 100000").limit("cg", cpu_max="700000 100000")
    assert machine.quotas() == [2.0, 7.0]


@pytest.mark.parametrize("group", ["/elsewhere", "/../other", "/docker/abc/../../x"])
def test_a_group_outside_of_the_mount_is_looked_for_at_the_mount(tmp_path, group):
    machine = Machine(tmp_path, [("/docker/abc", "/cg", "cgroup2", "rw")], [f"0::{group}"])
    assert machine.limit("cg", cpu_max="100000 100000").quotas() == [1.0]


def test_version_1_of_control_groups(tmp_path):
    memory = ("/", "/cg/memory", "cgroup", "rw,memory")
    machine = Machine(tmp_path, [V1, memory], ["3:cpu,cpuacct:/job", "2:memory:/job"])
    machine.limit("cg/cpu/job", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    machine.limit("cg/cpu", cpu_cfs_quota_us="300000", cpu_cfs_period_us="100000")
    machine.limit("cg/memory/job", cpu_cfs_quota_us="1", cpu_cfs_period_us="100000")
    assert machine.quotas() == [3.0]


def test_both_versions_side_by_side(tmp_path):
    machine = Machine(tmp_path, [V1, ("/", "/cg/unified", "cgroup2", "rw")], ["1:cpu:/x", "0::/y"])
    machine.limit("cg/cpu/x", cpu_cfs_quota_us="400000", cpu_cfs_period_us="100000")
    machine.limit("cg/unified/y", cpu_max="600000 100000")
    assert machine.quotas() == [4.0, 6.0]


def test_a_mount_point_with_a_blank(tmp_path):
    machine = Machine(tmp_path, [("/", "/c\\040g", "cgroup2", "rw")], ["0::/"])
    assert machine.limit("c g", cpu_max="100000 100000").quotas() == [1.0]


@pytest.mark.parametrize("content", ["", "garbage", "1", "max", "100000 0x"])
def test_odd_limit_files_are_no_limit(tmp_path, content):
    assert Machine(tmp_path, [V2], ["0::/"]).limit("cg", cpu_max=content).quotas() == []


def test_no_proc_is_no_limit(tmp_path):
    assert list(extension._cgroup_quotas(tmp_path / "nothing")) == []


@pytest.mark.parametrize("quota, cpus, expected", [
    ("150000 100000", 4, 1), ("20000 100000", 4, 1), ("300000 100000", 4, 3), ("400000 100000", 4, 4),
    ("800000 100000", 2, 2), ("max 100000", 3, 3)])
def test_threads_and_their_reason(tmp_path, monkeypatch, quota, cpus, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    machine = Machine(tmp_path, [V2], ["0::/"]).limit("cg", cpu_max=quota)
    count, reason = extension.usable_cpus(machine.proc)
    assert count == expected
    if expected < cpus:
        assert reason.startswith("a quota of ") and "cpu.max" in reason and f"of {cpus} in the affinity mask" in reason
    else:
        assert reason == "the processors of the affinity mask"


@needs_extension
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask_sets_the_threads():
    code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import fastgpt;"
            "from fastgpt import extension; print(fastgpt.get_num_threads(), extension.THREADS_REASON)")
    assert run_python(code).stdout.strip() == "1 the processors of the affinity mask"


@needs_extension
def test_set_num_threads(monkeypatch):
    import fastgpt
    before = fastgpt.get_num_threads()
    x, weight = torch.randn(301, 96), torch.randn(96)
    results = []
    for count in (5, 1, 2, before):
        fastgpt.set_num_threads(count)
        assert fastgpt.get_num_threads() == count
        results.append(fastgpt.ops.layer_norm(x, weight))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("count", [0, -1, 1025, 2.0, "2", None, True])
def test_bad_numbers_of_threads_are_named(count):
    with pytest.raises(ValueError, match="set_num_threads: count must be an int from 1 to 1024, got "):
        extension.set_num_threads(count)
