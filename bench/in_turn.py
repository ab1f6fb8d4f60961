"""All peers of a case in one process, in turn, round by round; another process for the next reading.

Peers that are slow to begin, because a compiler has to look at them, stay in the first process, beside ours.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from children import Child
from measure import CPU_ROUND_MS, Call, Timing, eager_times, said, wall
from reader import Reader
from rounds import READING, Rounds

MOST_ROUNDS = 25
"""Rounds of a reading."""
SLOW = 1.0
"""A peer that took more seconds to begin is not begun again."""
Timings = dict[str, Timing | str]


def read(peers: Mapping[str, Sequence[Call]], names: Sequence[str]) -> tuple[dict[str, float], Timings]:
    """A reading: seconds that the first call of each took, and times of all or why there are none."""
    beginnings = {}
    for name in names:
        with suppress(Exception):  # it is told when it fails again
            beginnings[name] = wall(peers[name][0]) / 1e3
    calls = {name: peers[name] for name in names}
    limits = {"rounds": MOST_ROUNDS, "seconds": READING * len(names)}
    return beginnings, eager_times(calls, "cpu", least_ms=CPU_ROUND_MS, **limits)


@dataclass
class InTurn(Reader):
    """Reads in turn.

    Attributes:
        quick, slow: names of the others, by how they begin.
        fresh: the process of the present reading.
        kept: that of the slow ones.
    """

    quick: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    fresh: Child | None = None
    kept: Child | None = None

    def begin(self, names: list[str]) -> None:
        self.quick, names[:] = list(names), []

    def read(self) -> dict[str, Rounds]:
        self.fresh = Child.answering(partial(read, self.peers), self.threads)
        beginnings, found = self._ask(self.fresh, self.quick)
        if self.kept is not None:
            found = self._ask(self.kept, self.slow)[1] | found
        late = [name for name in self.quick if beginnings.get(name, 0.0) > SLOW]
        if late and self.kept is None:
            self.kept, self.slow = self.fresh, late
            self.quick = [name for name in self.quick if name not in late]
        else:
            self.fresh.end()
        return found

    def end(self) -> None:
        for child in (self.fresh, self.kept):
            if child is not None:
                child.end()

    def _ask(self, child: Child, others: Sequence[str]) -> tuple[dict[str, float], dict[str, Rounds]]:
        """A reading of ours and others. What fails is not asked again; if the process does, all that it alone
        has."""
        names = [name for name in (self.first, *others) if name not in self.failed]
        try:
            beginnings, found = child.ask(names)
        except RuntimeError as error:
            self.failed |= dict.fromkeys(others if child is self.kept else names, said(error))
            return {}, {}
        self.failed |= {name: reason for name, reason in found.items() if isinstance(reason, str)}
        timings = {name: timing for name, timing in found.items() if isinstance(timing, Timing)}
        against = timings.get(self.first) or next(iter(timings.values()), None)
        return beginnings, {
            name: Rounds(list(timing.each), list(timing.over(against).each))
            for name, timing in timings.items()
            if against is not None
        }
