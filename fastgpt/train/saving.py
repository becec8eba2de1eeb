"""Folders that are either the old or the new one, whole, whenever the process or the disk gives up."""
import contextlib
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def replaced_folder(path):
    """Yields a new folder to fill, which then takes the place of `path`, durably.

    On an error `path` is as it was. A kill leaves the old folder or the new one: between the two renames the old
    one is at `path.old`, from where `recover` brings it back.
    """
    path = Path(path)
    new, old = path.with_name(path.name + ".new"), _old(path)
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        _sync_tree(new)
        recover(path)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        new.rename(path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        recover(path)
        if isinstance(error, Exception):
            raise _save_error(path, error) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(path):
    """Brings back the folder that a kill has left between the two renames of `replaced_folder`."""
    if kept_at(path) != Path(path):
        _old(path).rename(path)


def kept_at(path):
    """Where the folder of `replaced_folder` is to be read from, while another process may be replacing it."""
    return _old(path) if not Path(path).exists() and _old(path).exists() else Path(path)


def _old(path):
    return Path(path).with_name(Path(path).name + ".old")


def _save_error(path, error):
    """The library underneath may raise kinds of its own when a write fails, and mostly names a temporary file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kept = f"; the one saved before is intact at {path}" if Path(path).exists() else ""
    return OSError(getattr(error, "errno", None), f"cannot save {path}: {reason}{kept}")


def _sync_tree(folder):
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name))
        _sync(root)


def _sync(path):
    if os.name == "nt":  # folders cannot be opened there, and files are synced when closed
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
