"""Python in a process of its own, with the very fastgpt that the tests import, whatever folder they were started in."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fastgpt

PACKAGE_FOLDER = str(Path(fastgpt.__file__).parents[1])


def run_python(code, *args, timeout=300, **env):
    """Runs `code`; `env` adds environment variables, or removes those that are None -> the finished process, with text."""
    path = os.pathsep.join(filter(None, (PACKAGE_FOLDER, os.environ.get("PYTHONPATH"))))
    env = {name: value for name, value in {**os.environ, "PYTHONPATH": path, **env}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False,
                          cwd=tempfile.gettempdir(), timeout=timeout, env=env)
