"""What a figure depends on: the processor, its kernels' level, threads, versions, commit, date and load."""
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from fastgpt import extension

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "numpy")


def describe():
    """The machine line of a results document."""
    cpus, reason = extension.usable_cpus()
    return {
        "cpu": _cpu_name(), "architecture": platform.machine(), "cpus": cpus, "cpus_reason": reason,
        "memory_gb": _memory_gb(), "caches": {str(level): size for level, size in cache_bytes().items()},
        "level": extension.LEVEL, "levels": _levels(), "bf16": has_bf16(), "vnni": has_vnni(),
        "system": platform.system(), "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES}, "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": list(os.getloadavg()),
    }


def one_line(machine):
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (f"{machine['cpu']}, {machine['cpus']} cores used, {machine['level'] or 'no extension'}; {versions}; "
            f"Python {machine['python']}; commit {machine['commit'] or 'unknown'}; {machine['date']}")


def has_bf16():
    return bool(extension._C and extension.LEVEL == "avx512" and extension._C.cpu_has_bf16())


def has_vnni():
    return bool(extension._C and extension.LEVEL == "avx512" and extension._C.cpu_has_vnni())


def cache_bytes(folder="/sys/devices/system/cpu/cpu0/cache"):
    """Level (2, 3) -> bytes of the first processor's caches; what the system does not tell is left out."""
    sizes = {}
    for index in sorted(Path(folder).glob("index*")):
        level, kind, size = (Path(index, name).read_text().strip() for name in ("level", "type", "size"))
        if kind == "Unified":
            sizes[int(level)] = int(size.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
    return sizes


def _levels():
    return [name for name in extension.LEVELS if extension._C and extension.level_refusal(name) is None]


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    family = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    return facts.get("model name", platform.machine()) + family


def _memory_gb():
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30, 1)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    """The commit of the sources, "+" behind it when they were changed since; None outside a repository."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
                             cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None
