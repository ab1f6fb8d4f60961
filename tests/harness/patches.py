"""Attributes replaced for a while."""

from collections.abc import Callable
from typing import Any

_MISSING = object()


class Patches:
    """Replaces attributes, and puts the former ones back in reverse order."""

    def __init__(self) -> None:
        self._former: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._former.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        """Replace a function by what `wrapper` makes of it."""
        self.set(owner, name, wrapper(getattr(owner, name)))

    def undo(self) -> None:
        while self._former:
            owner, name, value = self._former.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
