"""Times on a CPU: every peer in a process of its own, all in step.

A machine that others use changes its speed from tenth to tenth of a second, and as much from minute to
minute. Calls timed one after the other then meet different machines, those that take seconds above all. Here
each peer's process runs while the others are stopped, for a slice of `SLICE` seconds, then the next one's,
and so on: all meet the same machine, however long their calls take. A call's time is what its process ran
for. Its ratio is how many of our calls were done in as many slices.
"""

import os
import re
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, pairwise, takewhile
from mmap import mmap
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from children import Child, say
from measure import Call, said, wall
from reader import Reader
from rounds import READING, Rounds

SLICE = 0.05
"""Seconds that a process runs before the next one does."""
LONG_READING = 1.0
"""Seconds that a process runs for in a reading at most, once it has a step to tell of."""
FEW_STEPS = 3
"""Steps that a shorter reading has at least."""
SLOW = 1.0
"""A process whose first call took so many seconds more than twice a later one stays for all readings."""
SPARE = 2**30
"""Bytes of memory that are left free beside what the processes take."""
ACTIVE, BEGUN, COUNT, ENDS = range(4)
"""What is where in the memory that a worker shares: `Worker.shared`."""
MOST_ENDS = 1 << 16


def free_memory() -> int | None:
    """Bytes that processes can still take; None where nobody says."""
    try:
        said = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        said = None
    return int(said[1]) << 10 if said else None


class Slice(NamedTuple):
    """When a worker ran, and ours in the same turn, each by its own clock: the seconds that it was active."""

    begin: float
    end: float
    ours_begin: float
    ours_end: float


@dataclass
class Worker:
    """A peer's process. It is stopped unless it has its slice.

    Attributes:
        child: the process.
        shared: with it: seconds that it was active before this slice; when the slice began, by perf_counter;
            how many calls have ended, and these ends, each the seconds that it had been active. The first
            end is the beginning of the first call.
        beginning: seconds that the first call took.
        slices: that it had since the present process of ours is there.
        origin: seconds it had been active when the present reading began.
        taken: steps that earlier readings took.
    """

    child: Child
    shared: memoryview
    beginning: float
    slices: list[Slice] = field(default_factory=list)
    origin: float = 0.0
    taken: int = 0

    @classmethod
    def of(cls, calls: Sequence[Call], threads: int) -> "Worker":
        """One that is ready.

        Raises:
            RuntimeError: why a call failed (`Retold`), or how the process ended.
        """
        shared = memoryview(mmap(-1, 8 * (ENDS + MOST_ENDS))).cast("d")
        child = Child.doing(partial(_work, calls, shared), threads)
        try:
            beginning = child.hear()
            child.wait(os.WUNTRACED)
        except BaseException:
            child.end()
            raise
        return cls(child, shared, beginning)

    @property
    def active(self) -> float:
        return self.shared[ACTIVE]

    @property
    def ends(self) -> memoryview:
        return self.shared[ENDS : ENDS + int(self.shared[COUNT])]

    @property
    def begun(self) -> int:
        """The first step that no reading took, and of which all slices are known."""
        before = bisect_left(self.ends, self.slices[0].begin) if self.slices else len(self.ends)
        return max(self.taken, before)

    @property
    def steps(self) -> list[tuple[float, float]]:
        """From there on, those that have ended: from when to when."""
        return list(pairwise(self.ends[self.begun :]))

    @property
    def is_read(self) -> bool:
        """Whether it has been active for as long as a reading takes, and has steps to tell of."""
        active, steps = self.active - self.origin, len(self.ends) - 1 - self.begun
        return active >= READING and steps >= (FEW_STEPS if active < LONG_READING else 1)

    @property
    def began_slowly(self) -> bool:
        """Whether its first call took more than later ones, as with a compiler."""
        return self.beginning > SLOW + 2 * max(end - begin for begin, end in pairwise(self.ends))

    def run(self, seconds: float) -> tuple[float, float]:
        """Let it run for so long: the slice by its clock.

        Raises:
            RuntimeError: it failed, or its process ended.
        """
        before = self.active
        begun = self.shared[BEGUN] = time.perf_counter()
        os.kill(self.child.pid, signal.SIGCONT)
        time.sleep(seconds)
        os.kill(self.child.pid, signal.SIGSTOP)
        status = self.child.wait(os.WUNTRACED)
        self.shared[ACTIVE] += time.perf_counter() - begun
        if not os.WIFSTOPPED(status):
            self.child.hear()
        return before, self.active


def _work(calls: Sequence[Call], shared: memoryview, words: Connection) -> None:
    """What a worker does: warm up, stop, then call for ever."""
    times = [wall(call) for call in calls]
    say(words, times[0] / 1e3)
    os.kill(os.getpid(), signal.SIGSTOP)
    for count, call in zip(range(MOST_ENDS), cycle(calls), strict=False):
        shared[ENDS + count] = shared[ACTIVE] + time.perf_counter() - shared[BEGUN]
        shared[COUNT] = count + 1
        call()
    raise RuntimeError(f"more than {MOST_ENDS:,} times were taken of one process")


def rounds_of(mine: Worker, ours: Worker) -> Rounds:
    """The new steps, as far as it is known what ours did meanwhile."""
    speeds = _speeds(mine.slices, ours.ends)
    steps = [step for step in mine.steps if speeds and step[1] <= speeds[-1][1]]
    times = [(end - begin) * 1e3 for begin, end in steps]
    return Rounds(times, [sum(_overlap(step, it) * it[2] for it in speeds) for step in steps])


def _speeds(slices: Sequence[Slice], ends: Sequence[float]) -> list[tuple[float, float, float]]:
    """Slices of a worker, each with the steps that ours did a second in the same turn; without the last ones,
    while it is not known when the step of ours will end that it was at."""
    known = takewhile(lambda it: it.ours_end <= ends[-1], slices)
    return [
        (
            it.begin,
            it.end,
            (_steps_by(ends, it.ours_end) - _steps_by(ends, it.ours_begin)) / (it.ours_end - it.ours_begin),
        )
        for it in known
    ]


def _steps_by(ends: Sequence[float], when: float) -> float:
    """Steps that were done by then, the share of the one under way included."""
    step = max(0, min(bisect_right(ends, when), len(ends) - 1) - 1)
    return step + (when - ends[step]) / (ends[step + 1] - ends[step])


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


@dataclass
class InStep(Reader):
    """Reads in step.

    Attributes:
        workers: of those that were taken on and have not failed, by name; all are held against the first.
    """

    workers: dict[str, Worker] = field(default_factory=dict)

    def begin(self, names: list[str]) -> None:
        for name in [name for name in self.workers if name != self.first]:
            self._end(name)
        if not self.workers and self.first not in self.failed:
            self._begin(self.first)
        most, begun = 0, 0
        while names and (begun == 0 or (free_memory() or SPARE) >= SPARE + most):
            before = free_memory()
            self._begin(names.pop(0))
            begun += 1
            most = max(most, (before or 0) - (free_memory() or 0))

    def end(self) -> None:
        for name in list(self.workers):
            self._end(name)

    @property
    def ours(self) -> Worker | None:
        return next(iter(self.workers.values()), None)

    def read(self) -> dict[str, Rounds]:
        """A reading: until everybody was active for a while and has a step that ended. Who has been waits for
        the others, but for ours."""
        self._renew()
        for worker in self.workers.values():
            worker.origin = worker.active
        while (ours := self.ours) is not None:
            self._turn(ours)
            if self.ours is ours and all(worker.is_read for worker in self.workers.values()):
                found = {name: rounds_of(worker, ours) for name, worker in self.workers.items()}
                if all(rounds.times for rounds in found.values()):
                    for name, rounds in found.items():
                        worker = self.workers[name]
                        worker.taken = worker.begun + len(rounds.times)
                    return found
        return {}

    def _turn(self, ours: Worker) -> None:
        """A slice for ours, then one for each that has to be read."""
        theirs = (0.0, 0.0)
        for name, worker in list(self.workers.items()):
            if worker is ours or not worker.is_read:
                try:
                    mine = worker.run(SLICE)
                except RuntimeError as error:
                    self._fail(name, error)
                    if worker is ours:
                        return self._hold_against_another()
                    continue
                theirs = mine if worker is ours else theirs
                worker.slices.append(Slice(*mine, *theirs))
        return None

    def _renew(self) -> None:
        """Replace those that were read and had not begun slowly by new processes."""
        before = self.ours
        for name, worker in list(self.workers.items()):
            if worker.taken and not worker.began_slowly:
                worker.child.end()
                self._begin(name)
        if self.ours is not before:
            self._hold_against_another()

    def _hold_against_another(self) -> None:
        """Of the steps that are under way nobody knows what another process of ours did meanwhile."""
        for worker in self.workers.values():
            worker.slices.clear()

    def _begin(self, name: str) -> None:
        try:
            self.workers[name] = Worker.of(self.peers[name], self.threads)
        except RuntimeError as error:
            self._fail(name, error)

    def _end(self, name: str) -> None:
        self.workers.pop(name).child.end()

    def _fail(self, name: str, error: RuntimeError) -> None:
        self.failed[name] = said(error)
        if name in self.workers:
            self._end(name)
