"""Classes that stand in for those of transformers: a module gets another class and stays the same object."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

__all__ = ["StandIn", "put_in", "take_out"]


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


def put_in(modules: Iterable[Any], stand_ins: Mapping[type, type]) -> None:
    """Give modules the classes that stand in for theirs, in place."""
    for module in modules:
        if type(module) in stand_ins:
            module.__class__ = stand_ins[type(module)]


def take_out(modules: Iterable[Any], stand_ins: Mapping[type, type]) -> None:
    """Give modules the classes back that they had before `put_in`, in place."""
    for module in modules:
        if type(module) in stand_ins.values():
            module.__class__ = module.original
