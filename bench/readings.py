"""Times on a CPU are read several times, until readings agree: on a machine that others use, each is another.

Nothing computes in the process that asks. Two ways to read:

- Short calls run in turn, in one process for all peers (`in_turn`): they meet the same machine as it is, and
  what a process is like is the same for all. The next reading is another process, for what it costs where
  code and data come to lie differs from process to process.
- Long calls run in step, each peer's in a process of its own (`in_step`): while a call of seconds runs, the
  machine becomes another. These are other processes for the next reading too.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

from children import apart
from in_step import InStep
from in_turn import InTurn
from measure import Call, wall
from reader import Reader
from rounds import Rounds, Told
from rows import settled

LONG_MS = 100.0
"""A call of ours that takes longer runs in step with the others."""
FEWEST, FEWEST_LONG = 5, 3
"""Readings before it counts that they agree; of those that are `LONG`, and where time is up."""
LONG = 3.0
"""Seconds of a reading that hardly depends on where the host has the cores."""


def once(calls: Sequence[Call]) -> float:
    """Milliseconds of a call that is not the first one."""
    return min(wall(calls[i % len(calls)]) for i in range(2))


def tell(
    peers: Mapping[str, Sequence[Call]],
    ours: str,
    *,
    threads: int,
    readings: int,
    seconds: float,
    steady: Callable[[], bool] = lambda: True,
) -> dict[str, Told | str]:
    """What readings tell of each peer, or the reason why it failed: the others go on.

    Args:
        peers: by name, the same call on several sets of inputs.
        ours: whom the others are held against; where it is not there or fails, no ratio means anything.
        threads: that each peer computes on.
        readings: at most; fewer where all ratios are settled.
        seconds: no further reading begins after so many, if there are `FEWEST_LONG`.
        steady: whether a reading counts that begins or ends now. One that is `LONG` counts anyway.
    """
    first = ours if ours in peers else next(iter(peers))
    try:
        is_long = apart(partial(once, peers[first]), threads) > LONG_MS
    except RuntimeError:  # it will fail once more, and be told
        is_long = False
    reader: Reader = (InStep if is_long else InTurn)(peers, first, threads)
    told = {name: Told() for name in peers}
    waiting = [name for name in peers if name != first]
    try:
        while True:
            reader.begin(waiting)
            _read(reader, told, readings, seconds, steady)
            if not waiting:
                break
    finally:
        reader.end()
    return told | reader.failed


def _read(
    reader: Reader, told: Mapping[str, Told], readings: int, seconds: float, steady: Callable[[], bool]
) -> None:
    """Readings until they agree; where fewer than `FEWEST_LONG` count, all do."""
    counted: list[dict[str, Rounds]] = []
    others: list[dict[str, Rounds]] = []
    spent = 0.0
    while len(counted) < readings and len(counted) + len(others) < 2 * readings:
        near, at = steady(), time.perf_counter()
        found = reader.read()
        if not found:
            break
        took = time.perf_counter() - at
        spent, long = spent + took, took > LONG
        (counted if long or near or steady() else others).append(found)
        late = spent > seconds and len(counted) + len(others) >= FEWEST_LONG
        if late or (len(counted) >= (FEWEST_LONG if long else FEWEST) and _agree(counted)):
            break
    if len(counted) >= min(FEWEST_LONG, readings):
        others = []
    for found in counted + others:
        for name, rounds in found.items():
            told[name].readings.append(rounds)
    for found in others:
        for name, rounds in found.items():
            told[name].unsteady += len(rounds.times)


def _agree(readings: Sequence[Mapping[str, Rounds]]) -> bool:
    """Whether one more would hardly move any ratio."""
    medians = [{name: median(rounds.ratios) for name, rounds in found.items()} for found in readings]
    each = ([found[name] for found in medians if name in found] for name in medians[-1])
    return all(settled({"median": median(its), "each": its}) for its in each)
