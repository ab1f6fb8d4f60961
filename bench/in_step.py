"""Times on a CPU: every peer in a process of its own, all in step.

A machine that others use changes its speed from tenth to tenth of a second, and as much from minute to
minute. Calls timed one after the other then meet different machines, those that take seconds above all. Here
each peer's process runs while the others are stopped, for a slice of `SLICE` seconds, then the next one's,
and so on: all meet the same machine, however long their calls take. A call's time is what its process ran
for. Its ratio is how many of our calls were done in as many slices.

Where a process's data come to lie in memory differs as well, and what that costs. So a reading is followed by
others, of new processes, until they agree. Processes that took long to begin (large models, compilers) stay.
"""

import os
import re
import signal
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, takewhile
from mmap import mmap
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from children import Child, Say
from measure import CPU_ROUND_MS, FEWEST, FEWEST_LONG, LONG, Call, Timing, always, said, wall
from rows import settled

SLICE = 0.05
"""Seconds that a process runs before the next one does."""
READING, LONG_READING = 0.25, 1.0
"""Seconds that every process runs for in a reading, at least; and at most, once it has a step to tell of."""
FEW_STEPS = 3
"""Steps that a reading of less has at least."""
RENEWED = 1.0
"""A process that took more seconds to begin is not replaced by another."""
WARM_MS = 500.0
"""Where all calls together take less, they warm up twice: what comes after the first one may be slow too."""
SPARE = 2**30
"""Bytes of memory that are left free beside what the processes take."""
ACTIVE, BEGUN, CALLS, COUNT, ENDS = range(5)
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
            the number of calls it times as one step; how many steps have ended, and these ends, each the
            seconds that it had been active. The first end is the beginning of the first step.
        beginning: seconds that it took until it could be timed.
        slices: since the present process of ours is there.
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
        begun = time.perf_counter()
        shared = memoryview(mmap(-1, 8 * (ENDS + MOST_ENDS))).cast("d")
        child = Child.doing(partial(_work, calls, shared), threads)
        try:
            child.hear()
            child.wait(os.WUNTRACED)
        except BaseException:
            child.end()
            raise
        return cls(child, shared, time.perf_counter() - begun)

    @property
    def active(self) -> float:
        return self.shared[ACTIVE]

    @property
    def ends(self) -> memoryview:
        return self.shared[ENDS : ENDS + int(self.shared[COUNT])]

    @property
    def calls(self) -> int:
        """That are a step."""
        return int(self.shared[CALLS])

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


def _work(calls: Sequence[Call], shared: memoryview, say: Say) -> None:
    """What a worker does: warm up, stop, then call for ever."""
    once = min(wall(call) for call in calls)
    if once * len(calls) < WARM_MS:
        once = min(wall(call) for call in calls)
    copies = max(1, min(100, round(CPU_ROUND_MS / max(once, 1e-3) / len(calls))))
    shared[CALLS] = copies * len(calls)
    say("ready")
    os.kill(os.getpid(), signal.SIGSTOP)
    for count in range(MOST_ENDS):
        shared[ENDS + count] = shared[ACTIVE] + time.perf_counter() - shared[BEGUN]
        shared[COUNT] = count + 1
        for _ in range(copies):
            for call in calls:
                call()
    raise RuntimeError(f"more than {MOST_ENDS:,} times were taken of one process")


@dataclass(frozen=True)
class Rounds:
    """What a worker did in a reading, step by step.

    Attributes:
        times: milliseconds of a call.
        ratios: over those of ours: where several steps fit a slice, over their median, since the first step
            after a break is slower; else over what ours did in the same slices.
    """

    times: list[float]
    ratios: list[float]

    @classmethod
    def of(cls, mine: Worker, ours: Worker) -> "Rounds":
        """The new steps; long ones as far as it is known what ours did meanwhile."""
        its = median(end - begin for begin, end in ours.steps)
        steps = mine.steps
        if max(its, median(end - begin for begin, end in steps)) <= SLICE / 2:
            ratios = [(end - begin) / its for begin, end in steps]
        else:
            speeds = _speeds(mine.slices, ours.ends)
            steps = [step for step in steps if speeds and step[1] <= speeds[-1][1]]
            ratios = [sum(_overlap(step, it) * it[2] for it in speeds) for step in steps]
        times = [(end - begin) * 1e3 / mine.calls for begin, end in steps]
        return cls(times, [ratio * ours.calls / mine.calls for ratio in ratios])


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
    step = min(bisect_right(ends, when), len(ends) - 1) - 1
    return step + (when - ends[step]) / (ends[step + 1] - ends[step])


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


@dataclass
class Told:
    """What readings tell of a peer.

    Attributes:
        readings: the rounds of each.
        unsteady: rounds among them that should not have counted, for want of others.
    """

    readings: list[Rounds] = field(default_factory=list)
    unsteady: int = 0

    @property
    def time(self) -> Timing:
        """Of a call, over the rounds of all readings."""
        return Timing.of([time for rounds in self.readings for time in rounds.times], self.unsteady)

    @property
    def each(self) -> list[float]:
        """Milliseconds of a call by each reading."""
        return [median(rounds.times) for rounds in self.readings]

    @property
    def ratio(self) -> dict[str, Any]:
        """Median of the readings' medians, which are `each`, and the interval of all their rounds."""
        each = [median(rounds.ratios) for rounds in self.readings]
        of_rounds = Timing.of([ratio for rounds in self.readings for ratio in rounds.ratios])
        return {"median": median(each), "low": of_rounds.p20, "high": of_rounds.p80, "each": each}


@dataclass
class Crew:
    """Workers of a case, and the peers that failed.

    Attributes:
        peers: calls by name.
        threads: that each computes on.
        workers: those that are there, by name; all are held against the first one.
        failed: why others are not.
    """

    peers: Mapping[str, Sequence[Call]]
    threads: int
    workers: dict[str, Worker] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        try:
            self.workers[name] = Worker.of(self.peers[name], self.threads)
        except RuntimeError as error:
            self._fail(name, error)

    def begin_some(self, names: list[str]) -> None:
        """Begin as many as there is memory for, but one; they leave the list."""
        most, begun = 0, 0
        while names and (begun == 0 or (free_memory() or SPARE) >= SPARE + most):
            before = free_memory()
            self.begin(names.pop(0))
            begun += 1
            most = max(most, (before or 0) - (free_memory() or 0))

    def end(self, names: Iterable[str]) -> None:
        for name in list(names):
            self.workers.pop(name).child.end()

    def renew(self) -> None:
        """Replace those that began quickly by new processes."""
        before = self.ours
        for name, worker in list(self.workers.items()):
            if worker.beginning <= RENEWED:
                worker.child.end()
                self.begin(name)
        if self.ours is not before:
            for worker in self.workers.values():
                worker.slices.clear()

    @property
    def ours(self) -> Worker | None:
        return next(iter(self.workers.values()), None)

    def read(self) -> dict[str, Rounds]:
        """A reading: until everybody was active for a while and has a step that ended. Who has been waits for
        the others, but for ours. Empty where nobody is left."""
        for worker in self.workers.values():
            worker.origin = worker.active
        while (ours := self.ours) is not None:
            in_turn: tuple[float, float] = (0.0, 0.0)
            for name, worker in list(self.workers.items()):
                if worker is not ours and worker.is_read:
                    continue
                try:
                    slice_ = worker.run(SLICE)
                except RuntimeError as error:
                    self._fail(name, error)
                    continue
                in_turn = slice_ if worker is ours else in_turn
                worker.slices.append(Slice(*slice_, *in_turn))
            if self.workers and all(worker.is_read for worker in self.workers.values()):
                found = {name: Rounds.of(worker, ours) for name, worker in self.workers.items()}
                if all(rounds.times for rounds in found.values()):
                    for name, rounds in found.items():
                        worker = self.workers[name]
                        worker.taken = worker.begun + len(rounds.times)
                    return found
        return {}

    def _fail(self, name: str, error: RuntimeError) -> None:
        self.failed[name] = said(error)
        if name in self.workers:
            self.end([name])


def in_step(
    peers: Mapping[str, Sequence[Call]],
    ours: str,
    *,
    threads: int,
    readings: int,
    seconds: float,
    steady: Callable[[], bool] = always,
) -> dict[str, Told | str]:
    """What is told of each peer, or the reason why it failed: the others go on.

    Args:
        peers: by name, the same call on several sets of inputs.
        ours: whom the others are held against; where it is not there or fails, no ratio means anything.
        threads: that each peer computes on.
        readings: at most; fewer where all ratios are settled.
        seconds: no further reading begins after so many, if there are `FEWEST_LONG`.
        steady: whether a reading counts that begins or ends now. One that is `LONG` counts anyway.
    """
    crew = Crew(peers, threads)
    told = {name: Told() for name in peers}
    waiting = [name for name in peers if name != ours]
    first = ours if ours in peers else waiting.pop(0)
    try:
        crew.begin(first)
        while True:
            crew.begin_some(waiting)
            _read(crew, told, readings, seconds, steady)
            if not waiting:
                break
            crew.end(name for name in crew.workers if name != first)
    finally:
        crew.end(crew.workers)
    return told | crew.failed


def _read(
    crew: Crew, told: Mapping[str, Told], readings: int, seconds: float, steady: Callable[[], bool]
) -> None:
    """Readings of those who are there; where fewer than `FEWEST_LONG` count, all do."""
    counted: list[dict[str, Rounds]] = []
    others: list[dict[str, Rounds]] = []
    begun = time.perf_counter()
    while crew.workers and len(counted) < readings and len(counted) + len(others) < 2 * readings:
        if counted or others:
            crew.renew()
        near, at = steady(), time.perf_counter()
        found = crew.read()
        long = time.perf_counter() - at > LONG
        (counted if long or near or steady() else others).append(found)
        late = time.perf_counter() - begun > seconds and len(counted) + len(others) >= FEWEST_LONG
        if late or (len(counted) >= (FEWEST_LONG if long else FEWEST) and _agree(counted)):
            break
    if len(counted) >= min(FEWEST_LONG, readings):
        others = []
    for found in counted + others:
        for name in found.keys() & crew.workers.keys():
            told[name].readings.append(found[name])
    for found in others:
        for name in found.keys() & crew.workers.keys():
            told[name].unsteady += len(found[name].times)


def _agree(readings: Sequence[Mapping[str, Rounds]]) -> bool:
    """Whether one more would hardly move any ratio."""
    medians = [{name: median(rounds.ratios) for name, rounds in found.items()} for found in readings]
    each = ([found[name] for found in medians if name in found] for name in medians[-1])
    return all(settled({"median": median(its), "each": its}) for its in each)
