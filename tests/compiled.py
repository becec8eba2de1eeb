"""The extension's objects, from the build that left them or built anew, and extensions built in other ways."""
import contextlib
import functools
import importlib.util
import os
import tempfile
from pathlib import Path
from unittest import mock

from setuptools import Distribution, Extension

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def inside(folder):
    """Within this context the working directory is `folder`."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@functools.cache
def setup_script():
    """setup.py as a module: it builds only when it is the main program."""
    spec = importlib.util.spec_from_file_location("fastgpt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with inside(ROOT):
        spec.loader.exec_module(module)
    return module


def kept_object(source):
    """The object of `source` that the last build left, or None when there is none that is newer than the sources."""
    newest = max(p.stat().st_mtime for p in [ROOT / "setup.py", *(ROOT / "csrc").rglob("*")] if p.is_file())
    found = sorted(ROOT.glob(f"build/temp.*/{Path(source).with_suffix('.o')}"), key=os.path.getmtime)
    return str(found[-1]) if found and found[-1].stat().st_mtime > newest else None


def build_extension(folder, extra_flags=None):
    """Builds the CPU part into `folder`, with extra_flags ({source: flags}) for some files; returns its path.

    Kept objects are taken for the files that no option of a build changes.
    """
    setup, extra_flags = setup_script(), extra_flags or {}

    class Build(setup.Build):
        def flags(self, source):
            return [*super().flags(source), *extra_flags.get(source, [])]

        def compile_source(self, source):
            kept = None if source in extra_flags or "bindings" in source else kept_object(source)
            return kept or super().compile_source(source)

    command = Build(Distribution({"ext_modules": [Extension("fastgpt._C", setup.SOURCES)]}))
    command.build_lib, command.build_temp = str(folder), str(Path(folder, "temp"))
    with inside(ROOT), mock.patch.dict(os.environ, FASTGPT_BUILD="cpu"):
        command.ensure_finalized()
        command.run()
    return next(Path(folder, "fastgpt").glob("_C*.so"))


@functools.cache
def objects():
    """{source: its object} of the CPU part."""
    kept = {source: kept_object(source) for source in setup_script().SOURCES}
    if not all(kept.values()):
        folder = tempfile.mkdtemp(prefix="fastgpt-objects-")
        build_extension(folder)
        kept = {source: kept[source] or str(Path(folder, "temp", source).with_suffix(".o")) for source in kept}
    return kept
