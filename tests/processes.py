"""Processes that tests start."""

import os


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without what pytest and its plugins put there, computing on one thread.

    A worker of pytest-xdist hands its identity down: a pytest it starts would take itself for a worker too,
    and would refuse to time benchmarks.
    """
    left_out = ("PYTEST_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"OMP_NUM_THREADS": "1"} | changes
