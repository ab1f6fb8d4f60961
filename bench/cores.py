"""How near to each other the cores are that this process computes on, and waiting until they are near.

On a virtual machine two threads at times take half as long again, for seconds or minutes, to hand work to
each other, and copy large memory faster meanwhile: as if its host had moved one of the cores away from the
cache that they share. The same calls, timed in the same way, then take up to 40% longer or shorter, and not
all of them alike, as if a run changed machines. So times are told of near cores.
"""

import statistics
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from measure import wall
from torch import Tensor

FAR = 1.25
"""Cores are apart while a hand-over takes more than so many times the shortest one seen."""
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
        patience: seconds that waiting may still take in this process, the first look not counted.
        nearest: microseconds of the shortest hand-over yet.
    """

    patience: float = 240.0
    nearest: float = float("inf")
    _resigned_until: float = float("-inf")
    _work: Tensor = field(default_factory=shared_work)

    def hand_over(self) -> float:
        """Microseconds that a small operation on all threads takes now."""
        times = [wall(partial(self._work.add_, 1.0)) for _ in range(50)]
        taken = statistics.median(times[10:]) * 1e3  # the first ones wake the other thread
        self.nearest = min(self.nearest, taken)
        return taken

    def are_near(self) -> bool:
        return self.hand_over() <= FAR * self.nearest

    def settle(self, seconds: float = 15.0) -> bool:
        """Whether the cores are near, having waited for it so long at most."""
        if self.nearest == float("inf"):
            for _ in range(SPINS_AT_FIRST):
                spin()
                self.hand_over()
        begun = time.perf_counter()
        until = begun + min(seconds, self.patience)
        while not (near := self.are_near()) and self._resigned_until < time.perf_counter() < until:
            spin()
        now = time.perf_counter()
        self.patience -= now - begun
        if not near and now >= until:
            self._resigned_until = now + RESIGNED
        return near


def spin() -> None:
    """Be busy on one thread and leave the others idle."""
    until = time.perf_counter() + SPIN
    while time.perf_counter() < until:
        pass
