"""Classes that stand in for those of transformers: a module gets another class and stays the same object."""

from typing import Any

from torch import nn

__all__ = ["StandIn"]


class StandIn:
    """What such classes have in common. Each also inherits from its `original`, the class it stands in for.

    `__name__` is the original's, which is what transformers prints and writes into configurations; pickles
    find the class by its `__qualname__`.
    """

    original: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "original" in cls.__dict__:
            cls.__name__ = cls.original.__name__
