"""What is told of a peer: rounds, by readings."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from measure import Timing

READING = 0.25
"""Seconds that each peer is read for, at least."""


@dataclass(frozen=True)
class Rounds:
    """Of one reading.

    Attributes:
        times: milliseconds of a call.
        ratios: over those of ours.
    """

    times: list[float]
    ratios: list[float]


@dataclass
class Told:
    """Of all readings.

    Attributes:
        readings: the rounds of each.
        unsteady: rounds among them that should not have counted, for want of others.
    """

    readings: list[Rounds] = field(default_factory=list)
    unsteady: int = 0

    @property
    def time(self) -> Timing:
        """Of a call, over all rounds."""
        return Timing.of([time for rounds in self.readings for time in rounds.times], self.unsteady)

    @property
    def each(self) -> list[float]:
        """Milliseconds of a call by each reading."""
        return [median(rounds.times) for rounds in self.readings]

    @property
    def ratio(self) -> dict[str, Any]:
        """Median of the readings' medians, which are `each`, and the interval of all rounds."""
        each = [median(rounds.ratios) for rounds in self.readings]
        of_rounds = Timing.of([ratio for rounds in self.readings for ratio in rounds.ratios])
        return {"median": median(each), "low": of_rounds.p20, "high": of_rounds.p80, "each": each}
