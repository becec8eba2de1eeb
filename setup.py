"""Builds fastgpt._C: the C++ kernels, each instruction-set level in a file with its own flags, and the CUDA part.

FASTGPT_BUILD=auto (the CPU part, and the CUDA part when nvcc is found) | cpu | cuda (raises without nvcc) | none (pure
Python, on PyTorch's ops). The build prints what it decided and why; `fastgpt info` shows it. CXX names the compiler.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CHOICES = ("auto", "cpu", "cuda", "none")
COMMON_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
                "-ffp-contract=fast", "-fno-lto", "-Wall", "-Wno-psabi", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mtune=haswell"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
X86_LEVEL_FLAGS = {
    "level_avx512.cpp": AVX512, "level_avx2.cpp": AVX2, "engine_avx512.cpp": AVX512, "engine_avx2.cpp": AVX2,
    "engine_avx512_vnni.cpp": [*AVX512, "-mavx512vnni"],
    "engine_avx512_bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
# Strips the symbols and hides the C++ library's templates and the CUDA runtime from other extensions in the process.
LINK_FLAGS = (["-Wl,-exported_symbol,_PyInit__C", "-Wl,-x"] if sys.platform == "darwin" else
              ["-Wl,--version-script=csrc/exports.map", "-s", "-pthread"])
# Machine code for these, as far as nvcc knows them (8.6 and 8.9 run that of 8.0), and PTX of one and of the last,
# from which a driver makes the rest.
CUDA_ARCHS, PTX_ARCH = ("75", "80", "90", "100", "120"), "90"
# The slowest first.
SOURCES = [f"csrc/cpu/{name}.cpp" for name in (
    "engine_avx512_bf16", "engine_avx512_vnni", "engine_avx512", "engine_avx2", "engine_baseline", "level_avx512",
    "level_baseline", "level_avx2")] + ["csrc/bindings_engine.cpp", "csrc/bindings.cpp", "csrc/cpu/isa.cpp", "csrc/cpu/pool.cpp"]
CUDA_SOURCES = [f"csrc/cuda/{name}.cu" for name in (
    "paged_attention_bytes", "paged_attention", "weight_only", "sampling", "store_kv", "device")]
CUDA_BINDINGS = "csrc/bindings_cuda.cpp"
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inl", ".cuh", ".map"))


def build_choice():
    choice = os.environ.get("FASTGPT_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"FASTGPT_BUILD={choice!r}: expected one of {', '.join(CHOICES)}")
    return choice


def find_nvcc():
    """(nvcc's path or None, where it is or where it was looked for). A CUDA_HOME that is set is the only place."""
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = shutil.which("nvcc", path=f"{home}/bin")
        return nvcc, nvcc or f"CUDA_HOME={home}"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return nvcc, nvcc or "PATH, CUDA_HOME and /usr/local/cuda/bin"


def choose_nvcc(choice):
    """(nvcc's path or None for a build without the CUDA part, the reason as text)."""
    if choice == "cpu":
        return None, "no CUDA part: FASTGPT_BUILD=cpu"
    nvcc, where = find_nvcc()
    if nvcc:
        return nvcc, f"CUDA part by {nvcc}"
    if choice == "cuda":
        raise PlatformError(f"FASTGPT_BUILD=cuda needs nvcc, which is not in {where}: install the CUDA toolkit, set "
                            "CUDA_HOME to where it is, or build with FASTGPT_BUILD=cpu")
    return None, f"no CUDA part: no nvcc in {where}"


def output_of(*command):
    return subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def probe(compiler):
    """(whether the compiler makes x86-64 code, its version), by its predefined macros."""
    if not shutil.which(compiler[0]):
        raise PlatformError(f"fastgpt needs a C++17 compiler and {compiler[0]!r} is not there: install one (g++ or "
                            "clang++), name one by CXX, or build with FASTGPT_BUILD=none for PyTorch's ops alone")
    macros = output_of(*compiler, "-dM", "-E", "-x", "c++", os.devnull).splitlines()
    version = next((line.split('"')[1] for line in macros if line.startswith("#define __VERSION__")), "?")
    return "#define __x86_64__ 1" in macros, f"{compiler[0]} {version}"


def cuda_flags(nvcc):
    known = output_of(nvcc, "--list-gpu-code").split()
    archs = [a for a in CUDA_ARCHS if f"sm_{a}" in known]
    if not archs:
        raise PlatformError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}: it is too old; build "
                            "with FASTGPT_BUILD=cpu, or with a newer CUDA toolkit")
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    host = ["-ccbin", shlex.split(os.environ["CXX"])[-1]] if "CXX" in os.environ else []
    code += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in dict.fromkeys((PTX_ARCH, archs[-1])) if a in archs]
    return ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2", *host, *code]


def cuda_link_flags(nvcc):
    """The static runtime, so that no toolkit is needed at run time, from the folders that nvcc itself links from."""
    dryrun = output_of(nvcc, "-dryrun", "-x", "cu", os.devnull)
    folders = next((line.split("=", 1)[1] for line in dryrun.splitlines() if "LIBRARIES=" in line), "")
    return [*(f for f in shlex.split(folders) if not f.endswith("/stubs")), "-lcudart_static", "-ldl", "-lrt"]


def usable_cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Build(build_ext):
    def build_extension(self, ext):
        choice = build_choice()
        nvcc, cuda_reason = choose_nvcc(choice)
        x86, version = probe(self.compiler.compiler_so_cxx)
        self.level_flags = X86_LEVEL_FLAGS if x86 else {}
        levels = ["baseline", *(["avx2", "avx512"] if x86 else [])]
        record = f"FASTGPT_BUILD={choice}: CPU part ({', '.join(levels)}) by {version}; {cuda_reason}"
        print(f"fastgpt: {record}", flush=True)
        self.defines = [f"-DFASTGPT_BUILD_RECORD={json.dumps(record)}", *(["-DFASTGPT_CUDA"] if nvcc else [])]
        jobs = [lambda s=s: self.compile_cuda(nvcc, s) for s in CUDA_SOURCES if nvcc]
        jobs += [lambda s=s: self.compile_source(s) for s in [*ext.sources, *([CUDA_BINDINGS] if nvcc else [])]]
        with ThreadPoolExecutor(usable_cpus()) as pool:
            objects = list(pool.map(lambda job: job(), jobs))
        self.link(objects, self.get_ext_fullpath(ext.name), cuda_link_flags(nvcc) if nvcc else [])

    def flags(self, source):
        return [*COMMON_FLAGS, *self.level_flags.get(Path(source).name, []), *self.defines]

    def compile_source(self, source):
        return self.compiler.compile([source], output_dir=self.build_temp, include_dirs=[get_include()],
                                     extra_postargs=self.flags(source))[0]

    def compile_cuda(self, nvcc, source):
        target = Path(self.build_temp, source + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run([nvcc, *cuda_flags(nvcc), "-c", source, "-o", str(target)], check=False).returncode:
            raise CompileError(f"{nvcc} failed on {source}, see above; FASTGPT_BUILD=cpu builds without the CUDA part")
        return str(target)

    def link(self, objects, target, flags):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=[*flags, *LINK_FLAGS], target_lang="c++",
                                         build_temp=self.build_temp)


def main():
    extensions = [Extension("fastgpt._C", SOURCES, depends=HEADERS)]
    if build_choice() == "none":
        print("fastgpt: FASTGPT_BUILD=none: pure Python, on PyTorch's ops", flush=True)
        extensions = []
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
