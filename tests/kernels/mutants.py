"""Do the kernel tests find faults? Plant small ones in the kernels, one at a time, and see.

    python tests/kernels/mutants.py [--list] [--only PART_OF_A_NAME] [--jobs 2]

Copies of the package and its tests get the faults of `planted_faults.py`; this checkout stays as it is. A
fault counts as found where a test fails: first those of FAST are run, then GAPS, then the whole test file.
Anything else (a test that fails without a fault, a fault whose text is gone, a run that takes too long) is
an error.

Exit status: 0; 1 where fewer than 95 % are found, or one that is not is missing from EXPLAINED.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

from planted_faults import EXPLAINED, MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from processes import clean_environment  # noqa: E402

SHARE = 0.95
"""Of the faults, to be found at least."""

LIMIT = 1800
"""Seconds a run of pytest may take."""

FAST = (
    "random_cases or is_not_rounded or nothing or poison or offsets or out_of_range or grouping or row_keys"
    " or no_visible or (dropout_mask and not 140 and not 530)"
)
"""The tests, by parts of their names, that find most faults in the least time."""

GAPS = "test_gaps.py"
"""Calls that the other files leave out."""

PYTEST = ("-x", "-q", "--tb=no", "--kernel-cases=12")
PLUGINS = ("-p", "no:benchmark", "-p", "no:cacheprovider", "-p", "only_the_copy")

PLUGIN = '''
"""Every module of the package must come from beside this file, not from an installation."""
import pathlib, sys

import pytest

def pytest_sessionfinish(session):
    here = pathlib.Path(__file__).parent
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] == "blip2_kernels" and file and here not in pathlib.Path(file).parents:
            pytest.exit(f"{name} was imported from {file}", returncode=70)
    if "blip2_kernels" not in sys.modules:
        pytest.exit("blip2_kernels was not imported", returncode=70)
'''


class MutantsError(Exception):
    """Nothing can be said about a fault: the tests fail without it, or did not run as they should."""


@dataclass(frozen=True)
class Run:
    """What a run of pytest said.

    Attributes:
        failed: the test that failed, with the error's first words, or None.
        seconds: it took.
    """

    failed: str | None
    seconds: float


class Checkout:
    """A copy of what the kernel tests need, in a folder of its own."""

    passed: ClassVar[set[tuple[str, str]]] = set()
    """Test file and selection of the runs without a fault: one copy's result is every copy's."""

    passing = threading.Lock()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("blip2_kernels", "model", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "only_the_copy.py").write_text(PLUGIN)

    def plant(self, mutant: Mutant) -> "Run":
        """Run the tests that should find a fault, with the fault in its place."""
        place = self.folder / mutant.file
        former, faulty = place.read_text(), mutant.source(self.folder)
        run = Run(None, 0.0)
        for test, selection in ((mutant.test, FAST), (GAPS, ""), (mutant.test, "")):
            with self.passing:
                self._pass_without_a_fault(test, selection)
            place.write_text(faulty)
            try:
                more = self._pytest(test, selection)
            finally:
                place.write_text(former)
            run = Run(more.failed, run.seconds + more.seconds)
            if run.failed:
                break
        return run

    def _pass_without_a_fault(self, test: str, selection: str) -> None:
        if (test, selection) in self.passed:
            return
        run = self._pytest(test, selection)
        if run.failed:
            raise MutantsError(f"{test} fails without any fault: {run.failed}")
        self.passed.add((test, selection))
        print(f"        {test} passes without a fault ({run.seconds:.0f} s)", flush=True)

    def _pytest(self, test: str, selection: str) -> Run:
        command = [sys.executable, "-m", "pytest", f"tests/kernels/{test}", *PYTEST, *PLUGINS]
        command += ["-k", selection] if selection else []
        # No bytecode: it is looked up by a file's size and time of change, and a fault may leave both.
        own = {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "250"}
        begin = time.monotonic()
        try:
            env = clean_environment(**own)
            done = subprocess.run(
                command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            raise MutantsError(f"{test}: more than {LIMIT} s") from None
        seconds = time.monotonic() - begin
        if done.returncode == 0:
            return Run(None, seconds)
        found = re.search(r"^FAILED \S+?::(.*)$", done.stdout, re.MULTILINE)
        if done.returncode != 1 or not found:
            output = (done.stdout + done.stderr)[-4000:]
            raise MutantsError(f"{test}: pytest ended with status {done.returncode}\n{output}")
        return Run(found[1], seconds)


def plant_all(chosen: Iterable[Mutant], folder: Path, jobs: int) -> Iterator[tuple[Mutant, Run]]:
    """What the tests say of each fault, in the order in which that is known; `jobs` copies at a time."""
    chosen, free = list(chosen), SimpleQueue()
    for job in range(jobs):
        free.put(Checkout(folder / str(job)))
    for mutant in chosen:
        mutant.source(ROOT)

    def plant(mutant: Mutant) -> tuple[Mutant, Run]:
        checkout = free.get()
        try:
            return mutant, checkout.plant(mutant)
        finally:
            free.put(checkout)

    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(plant, mutant) for mutant in chosen]
        try:
            for run in as_completed(runs):
                yield run.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names and plant nothing")
    parser.add_argument("--only", default="", metavar="NAME", help="plant those with this in their names")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at a time (default 1)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected 1 or more, got {arguments.jobs}")
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    if not chosen:
        parser.error(f"--only: expected a part of a name, got {arguments.only!r}; --list prints the names")
    width = max(len(mutant.name) for mutant in chosen)
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name:{width}}  {mutant.file}")
        return 0

    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, (mutant, run) in enumerate(plant_all(chosen, Path(folder), arguments.jobs), 1):
                if run.failed is None:
                    survivors.append(mutant)
                place = mutant.file.removeprefix("blip2_kernels/ops/").replace("triton/", "")
                what = f"{mutant.name:{width}} {place:32} {run.seconds:4.0f} s"
                print(f"{number:3}/{len(chosen)} {what}  {(run.failed or 'SURVIVES')[:100]}", flush=True)
        except (MutantsError, ValueError) as error:
            raise SystemExit(str(error)) from None
    return summary(len(chosen), survivors)


def summary(planted: int, survivors: list[Mutant]) -> int:
    """Print the share of faults that were found, and what is known of the others; gives the exit status."""
    share = (planted - len(survivors)) / planted
    print(f"{planted - len(survivors)} of {planted} faults were found: {share:.1%}")
    for mutant in survivors:
        print(f"not found: {mutant.name} ({EXPLAINED.get(mutant.name, 'UNEXPLAINED')})")
    unexplained = [mutant for mutant in survivors if mutant.name not in EXPLAINED]
    return int(share < SHARE or bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
