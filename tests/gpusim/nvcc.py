"""What nvcc makes of a .cu for an architecture: PTX of the whole file, and machine code of one kernel out of it.

Both are kept in the temporary folder under a hash of the sources, the compiler and the options.
"""
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_shim
from cuda_shim import CSRC
from ptx_parser import alone, entries

OPTIONS = ["-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
KEPT_DAYS = 2
FOLDER = Path(tempfile.gettempdir(), f"fastgpt-nvcc-{os.getuid()}")


@functools.cache
def path():
    """The compiler, or None."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


MISSING = None if path() else "nvcc, the CUDA compiler, is not installed"


def ptx(source, arch):
    """The PTX text of a source for sm_<arch>."""
    sources = cuda_shim._with_includes(Path(source))
    return _kept([path.read_bytes() for path in sources], ".cu", "-ptx", arch, Path(source)).decode()


def cubin(text, name, arch):
    """The machine code of the entry `name` of a PTX text."""
    return _kept([alone(text, name).encode()], ".ptx", "-cubin", arch)


def find(symbol, arch):
    """The PTX of the file of csrc/cuda that has the kernel."""
    try:
        return next(text for text in _all(arch) if symbol in entries(text)[1])
    except StopIteration:
        raise LookupError(f"nvcc's PTX for sm_{arch} has no kernel {symbol}") from None


@functools.cache
def _all(arch):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: ptx(source, arch), cuda_shim.kernel_sources()))


def _kept(contents, suffix, option, arch, source=None):
    """The compiler's output, from an earlier run if there was one. contents: all that it depends on."""
    command = [path(), *OPTIONS, option, f"-arch=sm_{arch}"]
    digest = hashlib.sha256("\n".join([version(), *command]).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    kept = FOLDER / digest.hexdigest()
    if not kept.exists():
        FOLDER.mkdir(exist_ok=True)
        _forget()
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            if source is None:
                source = Path(folder, "kernel" + suffix)
                source.write_bytes(contents[0])
            result = Path(folder, "result")
            done = subprocess.run([*command, str(source), "-o", str(result)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")
            os.replace(result, kept)
    os.utime(kept)
    return kept.read_bytes()


def _forget():
    """Removes what nobody asked for lately."""
    for old in FOLDER.iterdir():
        if old.is_file() and old.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            old.unlink(missing_ok=True)


@functools.cache
def version():
    """As in "V13.0.88"."""
    return re.search(r"V[\d.]+", subprocess.run([path(), "--version"], capture_output=True, text=True, check=True).stdout)[0]
