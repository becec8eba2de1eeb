"""What setup.py decides and builds; that no AVX code escapes from its level; that the sources compile elsewhere."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from compiled import ROOT, inside, objects, setup_script
from processes import run_python

from fastgpt import extension

needs_extension = pytest.mark.skipif(bool(extension.MISSING), reason=str(extension.MISSING))
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("objdump")), reason="no binutils")
COMPILER = shutil.which("g++") or shutil.which("clang++")
LEVEL_TABLES = {"csrc/cpu/level_avx2.cpp": "fastgpt::kAvx2", "csrc/cpu/level_avx512.cpp": "fastgpt::kAvx512",
                "csrc/cpu/engine_avx2.cpp": "fastgpt::kEngineAvx2", "csrc/cpu/engine_avx512.cpp": "fastgpt::kEngineAvx512",
                "csrc/cpu/engine_avx512_vnni.cpp": "fastgpt::kEngineAvx512Vnni",
                "csrc/cpu/engine_avx512_bf16.cpp": "fastgpt::kEngineAvx512Bf16"}


def build(*arguments, folder=ROOT, **env):
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=folder, capture_output=True, text=True,
                          check=False, env={**os.environ, **env})


def build_ext(tmp_path, **env):
    return build("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path), **env)


# Decisions


def test_an_unknown_choice_is_refused(tmp_path):
    result = build_ext(tmp_path, FASTGPT_BUILD="gpu")
    assert result.returncode and "FASTGPT_BUILD='gpu': expected one of auto, cpu, cuda, none" in result.stderr


def test_cuda_without_nvcc_is_refused(tmp_path):
    result = build_ext(tmp_path, FASTGPT_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert result.returncode and not list(tmp_path.iterdir())
    assert f"needs nvcc, which is not in CUDA_HOME={tmp_path}: install the CUDA toolkit, set CUDA_HOME" in result.stderr


def test_auto_takes_nvcc_where_it_is(tmp_path, monkeypatch):
    choose_nvcc = setup_script().choose_nvcc
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert choose_nvcc("auto") == (None, f"no CUDA part: no nvcc in CUDA_HOME={tmp_path}")
    assert choose_nvcc("cpu") == (None, "no CUDA part: FASTGPT_BUILD=cpu")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_90\n")
    nvcc.chmod(0o755)
    assert choose_nvcc("auto") == choose_nvcc("cuda") == (str(nvcc), f"CUDA part by {nvcc}")
    monkeypatch.delenv("CXX", raising=False)
    codes = [flag for flag in setup_script().cuda_flags(str(nvcc)) if flag.startswith("-gencode")]
    assert codes == [f"-gencode=arch=compute_{a},code={kind}" for a, kind in (("75", "sm_75"), ("90", "sm_90"), ("90", "compute_90"))]
    nvcc.write_text("#!/bin/sh\necho sm_50\n")
    with pytest.raises(Exception, match="knows none of the architectures 75, 80, 90, 100, 120: it is too old"):
        setup_script().cuda_flags(str(nvcc))
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert choose_nvcc("auto") == (str(nvcc), f"CUDA part by {nvcc}")


def test_without_a_compiler_one_sentence_says_so(tmp_path):
    result = build_ext(tmp_path, CXX="no-such-compiler", FASTGPT_BUILD="cpu")
    assert result.returncode and "needs a C++17 compiler and 'no-such-compiler' is not there" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_compiler_that_cxx_names_is_used(tmp_path):
    compiler = tmp_path / "my-compiler"
    compiler.write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/calls\nexit 1\n")
    compiler.chmod(0o755)
    result = build_ext(tmp_path / "out", CXX=str(compiler), FASTGPT_BUILD="cpu")
    assert result.returncode and f"by {compiler}" in result.stdout
    assert "csrc/" in (tmp_path / "calls").read_text()


@needs_extension
def test_the_extension_tells_how_it_was_built():
    record = extension._C.BUILD
    assert re.match(r"FASTGPT_BUILD=(auto|cpu|cuda): CPU part \(baseline", record)
    devices, reason = extension._C.cuda_devices()
    if "; CUDA part by" not in record:
        assert (devices, reason) == ([], "this build has no CUDA part")
        pytest.skip(f"built without the CUDA part: {record.split('; ')[1]}")
    assert bool(devices) != bool(reason)
    for name, major, minor, memory in devices:
        assert name and major >= 3 and minor >= 0 and memory > 2 ** 28


# What is packed


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, in which builds may leave their files."""
    folder = tmp_path_factory.mktemp("checkout") / "fastgpt"
    leave = shutil.ignore_patterns("build", "dist", "*.egg-info", ".git", "__pycache__", "*.so", ".*_cache", "results")
    shutil.copytree(ROOT, folder, ignore=leave)
    return folder


def test_a_pure_python_package(checkout, tmp_path):
    result = build("bdist_wheel", "--dist-dir", str(tmp_path), folder=checkout, FASTGPT_BUILD="none")
    assert result.returncode == 0 and "FASTGPT_BUILD=none: pure Python" in result.stdout, result.stderr
    wheel, = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastgpt/ops.py" in names and not [n for n in names if n.endswith((".so", ".cpp"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # An editable install finds the checkout's fastgpt._C for whichever fastgpt is imported.
    code = ("import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]; "
            "sys.path.insert(0, sys.argv[1]); import fastgpt.extension as e; "
            "assert e.__file__.startswith(sys.argv[1]); print(e.MISSING)")
    result = run_python(code, str(tmp_path / "site"), PYTHONPATH="")
    assert "built with FASTGPT_BUILD=none; reinstall fastgpt, with FASTGPT_BUILD=auto" in result.stdout, result.stderr


def test_the_source_package_has_everything(checkout, tmp_path):
    result = build("sdist", "--dist-dir", str(tmp_path), folder=checkout)
    assert result.returncode == 0, result.stderr
    archive, = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed_files:
        packed = {name.partition("/")[2] for name in packed_files.getnames()}
    wanted = {str(p.relative_to(checkout)) for folder in ("csrc", "fastgpt", "tests", "benchmarks", ".ci")
              for p in (checkout / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CONTRIBUTING.md"}
    assert not wanted - packed


# No AVX code outside of its level


def lines_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def shared_symbols(path):
    """What the linker may take from this object for others, or from others for this one."""
    return {line.split(maxsplit=2)[2] for line in lines_of("nm", "-C", "--extern-only", "--defined-only", path)}


def avx_instructions(path):
    """VEX and EVEX instructions: their names begin with v, which no others that a compiler emits do."""
    found = (re.match(r"\s+[0-9a-f]+:\s+(v\w+|.*%[yz]mm)", line)
             for line in lines_of("objdump", "-d", "--no-show-raw-insn", path))
    return [match.string.strip() for match in found if match]


def runs_code_at_load(path):
    return any(".init_array" in line for line in lines_of("objdump", "-h", path))


@needs_binutils
def test_a_level_shares_its_table_only():
    for source, table in LEVEL_TABLES.items():
        assert shared_symbols(objects()[source]) == {table}
        assert not runs_code_at_load(objects()[source])
    if "avx2" in extension._C.BUILD:
        assert all(avx_instructions(objects()[source]) for source in LEVEL_TABLES)


@needs_binutils
def test_the_other_objects_have_no_avx_code():
    for source, path in objects().items():
        if source not in LEVEL_TABLES:
            assert not avx_instructions(path), source


@needs_binutils
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="reads x86-64 code")
@pytest.mark.parametrize(("prefix", "disassembled", "lone"), [("engine_avx", "-d", "\tmovsb"), ("level_avx512", "-r", "memcpy")],
                         ids=["bytes", "tails"])
def test_vectors_are_not_made_lane_by_lane(prefix, disassembled, lone):
    """Hundreds where GCC widens vectors of bytes by itself, or where a row's tail is copied, before which every sum is spilled."""
    sources = [source for source in LEVEL_TABLES if Path(source).name.startswith(prefix)]
    assert sources
    for source in sources:
        assert sum(lone in line for line in lines_of("objdump", disassembled, objects()[source])) < 10, source


@needs_binutils
@pytest.mark.skipif(not COMPILER or os.uname().machine != "x86_64", reason="compiles for x86-64")
@pytest.mark.parametrize("line", ["inline float shared(float x) { return x * x; } float (*use)(float) = shared;",
                                  "void f(std::vector<float>& v, float x) { v.push_back(x * x); }",
                                  "float global(float x) { return x * x; }"], ids=["inline", "template", "function"])
def test_planted_escapes_are_seen(line, tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text(f"#include <vector>\n{line}\n")
    subprocess.run([COMPILER, "-O1", "-mavx2", "-c", str(source), "-o", f"{source}.o"], check=True)
    assert shared_symbols(f"{source}.o") and avx_instructions(f"{source}.o")


@needs_binutils
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_planted_code_at_load_is_seen(tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text("float f(); float x = f();\n")
    subprocess.run([COMPILER, "-O1", "-c", str(source), "-o", f"{source}.o"], check=True)
    assert runs_code_at_load(f"{source}.o")


@needs_extension
@needs_binutils
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_extension_exports_its_entry_only_and_needs_no_cuda():
    symbols = [line.split()[-1] for line in lines_of("nm", "-D", "--defined-only", extension._C.__file__)]
    assert symbols == ["PyInit__C"]
    needed = [line for line in lines_of("objdump", "-p", extension._C.__file__) if "NEEDED" in line]
    assert needed and not [line for line in needed if "cuda" in line or "torch" in line]
    assert Path(extension._C.__file__).stat().st_size < 24e6  # most of it machine code for five kinds of GPU


# The sources


def test_sources_include_no_torch_and_levels_no_cpp_headers():
    for path in [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]:
        includes = re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())
        assert not [name for name in includes if re.match(r"(torch|ATen|c10)/", name)], path
        if path.suffix == ".inl" or path.name.startswith(("level_", "engine_")) or path.name in (
                "vec.h", "pool.h", "kernels.h", "engine.h"):
            assert not [name for name in includes if not name.endswith((".h", ".inl"))], path


def test_setup_names_every_source():
    setup = setup_script()
    with inside(ROOT):
        found = {str(p) for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert found == {*setup.SOURCES, *setup.CUDA_SOURCES, setup.CUDA_BINDINGS}


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_other_compilers_take_the_sources(compiler, tmp_path):
    """All but the bindings, which need this interpreter's headers. The levels of x86 are empty on other processors."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    setup = setup_script()
    x86, _ = setup.probe([compiler])
    for source in setup.SOURCES:
        flags = setup.X86_LEVEL_FLAGS.get(Path(source).name, []) if x86 else []
        if "bindings" not in source:
            command = [compiler, "-fPIC", *setup.COMMON_FLAGS, *flags, "-O0", "-c", str(ROOT / source),
                       "-o", str(tmp_path / "object.o")]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
