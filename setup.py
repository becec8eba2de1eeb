"""Builds fastgpt._C: the C++ kernels, each instruction-set level in a file with its own flags.

FASTGPT_BUILD=auto (default) | cpu | cuda | none chooses what is built; the build prints what it decided and why.
"""
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
                "-ffp-contract=fast", "-Wall", "-Wno-psabi", "-g0"]
X86_LEVEL_FLAGS = {
    "level_avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "level_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c",
                         "-mprefer-vector-width=512"],
}
LEVEL_FLAGS = X86_LEVEL_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {}


class Build(build_ext):
    def build_extension(self, ext):
        print(f"fastgpt: building the CPU kernels (levels: baseline{''.join(', ' + n[6:-4] for n in LEVEL_FLAGS)})")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for part in pool.map(lambda s: self.compile_source(ext, s), ext.sources) for o in part]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++",
                                         build_temp=self.build_temp)

    def compile_source(self, ext, source):
        flags = COMMON_FLAGS + LEVEL_FLAGS.get(Path(source).name, [])
        return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags,
                                     include_dirs=[get_include()], depends=ext.depends)


SOURCES = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inl"))
choice = os.environ.get("FASTGPT_BUILD", "auto")
if choice not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"FASTGPT_BUILD={choice!r}: expected auto, cpu, cuda or none")

setup(ext_modules=[] if choice == "none" else [Extension("fastgpt._C", SOURCES, depends=HEADERS)],
      cmdclass={"build_ext": Build})
