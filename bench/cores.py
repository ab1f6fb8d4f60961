"""How near to each other the cores are that this process computes on, and waiting until they are near.

On a virtual machine two threads at times take half as long again, for seconds or minutes, to hand work to
each other, and copy large memory faster meanwhile: as if its host had moved one of the cores away from the
cache that they share. The same calls, timed in the same way, then take up to 40% longer or shorter, and not
all of them alike, as if a run changed machines. So times are told of near cores.
"""

import statistics
import time
from bisect import insort
from dataclasses import dataclass, field
from functools import partial

import torch
from children import Child
from measure import wall
from torch import Tensor

FAR = 1.25
"""Cores are apart while a hand-over takes more than so many times what it takes while they are near."""
NEAR = 0.1
"""Share of the looks that were quicker than what counts as near: the very shortest one would be luck."""
SPIN = 0.4
"""Seconds on one thread, while which the host may move the other's core."""
SPINS_AT_FIRST = 10
"""Before these nobody knows how near the cores can be."""
RESIGNED = 60.0
"""Seconds for which nobody waits after having waited in vain."""


def shared_work() -> Tensor:
    """What torch just about splits between two threads."""
    return torch.zeros(2 * 32768)


@dataclass
class Cores:
    """The cores of this process, watched.

    Attributes:
        patience: seconds that waiting may still take in this process, the first looks not counted.
        looks: microseconds of the hand-overs yet, in ascending order.
    """

    patience: float = 60.0
    looks: list[float] = field(default_factory=list)
    _resigned_until: float = float("-inf")
    _work: Tensor = field(default_factory=shared_work)

    @property
    def nearest(self) -> float:
        """Microseconds of a hand-over between near cores."""
        return self.looks[int(NEAR * len(self.looks))]

    def hand_over(self) -> float:
        """Microseconds that a small operation on all threads takes now."""
        times = [wall(partial(self._work.add_, 1.0)) for _ in range(50)]
        return statistics.median(times[10:]) * 1e3  # the first ones wake the other thread

    def are_near(self) -> bool:
        taken = self.hand_over()
        insort(self.looks, taken)
        return taken <= FAR * self.nearest

    def settle(self, seconds: float = 15.0) -> bool:
        """Whether the cores are near, having waited for it so long at most."""
        if not self.looks:
            for _ in range(SPINS_AT_FIRST):
                spin()
                self.are_near()
        begun = time.perf_counter()
        until = begun + min(seconds, self.patience)
        while not (near := self.are_near()) and self._resigned_until < time.perf_counter() < until:
            spin()
        now = time.perf_counter()
        self.patience -= now - begun
        if not near and now >= until:
            self._resigned_until = now + RESIGNED
        return near


class Scout:
    """`Cores` seen by a process of its own, for one that computes on one thread, so that it can fork.

    Attributes:
        nearest: microseconds of a hand-over between near cores, infinite before anybody looked.
    """

    def __init__(self, threads: int) -> None:
        self.nearest = float("inf")
        cores = Cores()

        def look(_: object) -> tuple[bool, float]:
            return cores.settle(), cores.nearest

        self._child = Child.answering(look, threads)

    def settle(self) -> bool:
        """As `Cores.settle`."""
        near, self.nearest = self._child.ask(None)
        return near

    def end(self) -> None:
        self._child.end()


def spin() -> None:
    """Be busy on one thread and leave the others idle."""
    until = time.perf_counter() + SPIN
    while time.perf_counter() < until:
        pass
