"""A way to read the times of a case's peers: `in_turn` and `in_step` are two."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from measure import Call
from rounds import Rounds


@dataclass
class Reader(ABC):
    """Reads a case.

    Attributes:
        peers: calls by name.
        first: whom the others are held against.
        threads: that each computes on.
        failed: peers that failed, and why.
    """

    peers: Mapping[str, Sequence[Call]]
    first: str
    threads: int
    failed: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def begin(self, names: list[str]) -> None:
        """Take on the first and as many others as there is memory for, at least one; these leave the list."""

    @abstractmethod
    def read(self) -> dict[str, Rounds]:
        """A reading of those that were taken on and have not failed. Empty where nobody is left."""

    @abstractmethod
    def end(self) -> None:
        """End all processes."""
