"""Processes that tests start, and what those that run side by side share."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without what pytest and its plugins put there, computing on one thread.

    A worker of pytest-xdist hands its identity down: a pytest it starts would take itself for a worker too,
    and would refuse to time benchmarks.
    """
    left_out = ("PYTEST_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this run that `make` has filled: the first worker to ask does it, the others wait."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / name
    folder.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            make(folder)
            done.touch()
    return folder
