"""Run a function in a process of its own, where Triton compiles: `drive` and `report` need one.

    from harness.fresh_process import call

    def shared_memory_of_a_launch(arch):  # at the top level of the test's file
        with fake_driver.drive(arch) as recorder: ...
        return recorder.launches[0].shared

    def test_...():
        assert call(shared_memory_of_a_launch, 90) <= 100_000

The function's file is loaded anew there, under its own name and with this process's search path. It must not
switch the interpreter on. Arguments and results travel as JSON: tuples come back as lists.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import clean_environment

TIMEOUT = 600
"""Seconds after which a process is ended."""


def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """What a module-level function returns in a new process: no interpreter, no GPU, one thread.

    Raises:
        RuntimeError: the function raised; with the traceback and what it printed.
    """
    if "." in function.__qualname__:
        raise TypeError(f"function: expected one at the top level of a module, got {function.__qualname__}")
    environment = clean_environment(
        CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(filter(None, sys.path))
    )
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        order = [function.__module__, function.__code__.co_filename, function.__name__, str(result)]
        process = subprocess.run(
            [sys.executable, "-m", __name__, *order],
            input=json.dumps([args, kwargs]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=environment,
            cwd=folder,
        )
        if process.returncode != 0 or not result.exists():
            said = f"{process.stdout[-4000:]}\n{process.stderr[-8000:]}"
            raise RuntimeError(f"{function.__name__} in a process of its own: {process.returncode}\n{said}")
        return json.loads(result.read_text())


def _answer(module_name: str, path: str, function: str, result: str) -> None:
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    args, kwargs = json.load(sys.stdin)
    Path(result).write_text(json.dumps(getattr(module, function)(*args, **kwargs)))


if __name__ == "__main__":
    _answer(*sys.argv[1:])
