"""csrc/cuda built by g++ for the CPU, where tests/gpusim/cusim runs a kernel thread by thread: a module with the launchers
of fastgpt._C.cuda, plain or for a sanitizer. Objects are kept in the temporary folder by what they are made of.
"""
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from cuda_module import load

ROOT = Path(__file__).resolve().parents[2]
CSRC, SIMULATOR = ROOT / "csrc", Path(__file__).with_name("cusim")
FOLDER = Path(tempfile.gettempdir(), f"fastgpt-cusim-{os.getuid()}")
KEPT_DAYS = 1
COMMON = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-w", f"-I{CSRC}", f"-I{SIMULATOR}"]
KERNEL = ["-O1", "-g1", "-fno-strict-aliasing", "-ffp-contract=off", "-fsanitize=alignment,null", "-x", "c++"]
BINDING = ["-O0", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]
# What the kernels are compiled with, and the simulator.
KINDS = {"plain": ([], []),
         "address": (["-fsanitize=address"], ["-DCUSIM_ADDRESS"]),
         "thread": (["-fsanitize=thread"], ["-DCUSIM_THREAD"])}


@functools.cache
def cuda_headers():
    """The folder of CUDA's headers, by nvcc or where they usually are, or None."""
    nvcc = shutil.which("nvcc", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    found = []
    if "CUDA_HOME" in os.environ:
        found.append(Path(os.environ["CUDA_HOME"], "include"))
    elif nvcc:
        told = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
        flags = shlex.split(" ".join(re.findall(r"INCLUDES=(.*)", told)))
        found += [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    found.append(Path("/usr/local/cuda/include"))
    return next((folder for folder in found if (folder / "cuda_fp16.h").exists()), None)


@functools.cache
def missing():
    """Why the shim can't be built, or None."""
    if not shutil.which("g++"):
        return "g++ is not installed"
    return None if cuda_headers() else "CUDA's headers are not installed"


def kernel_sources():
    return [path for path in sorted((CSRC / "cuda").glob("*.cu")) if path.name != "device.cu"]


def build(kind="plain", sources=None):
    """Compiles sources (default: all of csrc/cuda and its bindings) and the simulator; returns the module's path.

    .cu are kernels and their launchers, the others bindings, one of which defines `define_cuda`.
    """
    sources = sources or [*kernel_sources(), CSRC / "bindings_cuda.cpp"]
    of_kernels, of_simulator = KINDS[kind]
    jobs = [(source, [*KERNEL, *of_kernels] if source.suffix == ".cu" else BINDING) for source in sources]
    jobs += [(SIMULATOR / "module.cpp", BINDING)]
    jobs += [(path, ["-O2", "-g1", *of_simulator]) for path in sorted(SIMULATOR.glob("*.cpp")) if path.name != "module.cpp"]
    objects = [_planned(*job) for job in jobs]
    paths = [str(path) for path, _ in objects]
    module = _kept_as("\n".join(paths), ".so"), ["g++", "-shared", *paths]
    if not module[0].exists():
        FOLDER.mkdir(exist_ok=True)
        with open(FOLDER / "lock", "w", encoding="utf8") as lock, ThreadPoolExecutor(2) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _forget()
            list(pool.map(lambda planned: _make(*planned), objects))
            _make(*module)
        if objects != [_planned(*job) for job in jobs]:  # edited meanwhile: what is kept may not be what is named
            for path in (*(path for path, _ in objects), module[0]):
                path.unlink(missing_ok=True)
            return build(kind, sources)
    os.utime(module[0])
    return module[0]


@functools.cache
def shim():
    """The plain module."""
    return load(build())


@contextlib.contextmanager
def launches(module, callback):
    """Within this context LAUNCH runs nothing; it calls callback(symbol, grid, block, shared_bytes, [bytes of each
    argument])."""
    module.set_recorder(callback)
    try:
        yield
    finally:
        module.set_recorder(None)


@functools.cache
def _compiler():
    """g++'s version and the flags of this machine: contraction is off, but a kernel's own fmaf should be one instruction."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    cpu = Path("/proc/cpuinfo")
    return version, ["-mfma"] if cpu.exists() and " fma " in cpu.read_text() else []


def _planned(source, flags):
    """(the path of the source's object, the command that makes it)."""
    version, of_machine = _compiler()
    command = ["g++", *COMMON, "-isystem", str(cuda_headers()), *of_machine, *flags, "-c", str(source)]
    contents = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in _with_includes(source)]
    return _kept_as("\n".join([version, *(flag.replace(str(ROOT), "") for flag in command), *contents]), ".o"), command


def _with_includes(source):
    """The source and the files of ours that it includes, directly or not."""
    found, new = [], [source]
    while new:
        found.append(path := new.pop())
        for name in re.findall(r'^\s*#include "(.*)"', path.read_text(encoding="utf8"), re.MULTILINE):
            places = (folder / name for folder in (path.parent, CSRC, SIMULATOR))
            included = next((place.resolve() for place in places if place.exists()), None)
            if included and included not in found and included not in new:
                new.append(included)
    return sorted(found)


def _kept_as(made_of, suffix):
    return FOLDER / (hashlib.sha256(made_of.encode()).hexdigest()[:24] + suffix)


def _make(path, command):
    """Has the command make the file, unless an earlier build did."""
    if not path.exists():
        new = path.with_suffix(".new" + path.suffix)
        done = subprocess.run([*command, "-o", str(new)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
        os.replace(new, path)
    os.utime(path)


def _forget():
    """Removes what no build asked for lately."""
    for path in FOLDER.glob("*.*"):
        if path.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            path.unlink()
