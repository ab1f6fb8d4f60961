"""Which memory a kernel may touch, and who touched it: bounds, duplicate stores and races of one launch.

A pointer knows its tensor. The guard hangs a `View` on the type of each pointer argument, the interpreter
hands that type on through arithmetic, broadcasts and reshapes, and each lane is checked against the elements
of that one tensor: reading the keys of a fused projection through the pointer to its queries is out of
bounds, although the memory is there. A pointer that no longer says where it comes from (made from an integer,
or selected from two tensors) may touch any tensor of the launch.

Races are found by two maps per storage: who wrote each element, and who read it. A program's marks are its
tickets: every program of a launch takes a new one, and another after each barrier. So a mark below the first
ticket of the running program is another program's. The order in which programs ran does not matter.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from harness.faults import DuplicateStore, OutOfBounds, Race

NOBODY, SEVERAL, ATOMICS = 0, -1, -2


@dataclass
class Storage:
    """One allocation, in units of the smallest element among the tensors that lie in it.

    Attributes:
        start, stop: addresses of its first byte and behind its last.
        unit: bytes.
    """

    start: int
    stop: int
    unit: int

    @cached_property
    def units(self) -> int:
        return -(-(self.stop - self.start) // self.unit)

    @cached_property
    def writers(self) -> np.ndarray:
        """int32 [units]: ticket of the program that wrote each, NOBODY, or ATOMICS."""
        return np.zeros(self.units, np.int32)

    @cached_property
    def readers(self) -> np.ndarray:
        """int32 [units]: first ticket of the program that read each, NOBODY, or SEVERAL."""
        return np.zeros(self.units, np.int32)

    @cached_property
    def lanes(self) -> np.ndarray:
        """int32 [units]: scratch, the lane that stored last."""
        return np.zeros(self.units, np.int32)

    def touched(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """The units that elements of `size` bytes at these addresses cover."""
        first = (addresses - self.start) // self.unit
        if size == self.unit:
            return first
        if size < self.unit:  # through a pointer cast to a smaller type
            return np.unique(first)
        return (first[:, None] + np.arange(size // self.unit)).ravel()


@dataclass
class View:
    """One tensor that a kernel was given.

    Attributes:
        name: of the parameter.
        shape, strides: in elements.
        size: bytes an element.
        start, stop: address of its first element and behind its last.
        contiguous: whether there is nothing between them but the tensor.
        storage: what it lies in.
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int
    start: int
    contiguous: bool
    storage: Storage

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str, storages: dict[int, Storage]) -> "View":
        """Describe a tensor; `storages` holds what the other tensors of the launch lie in, by address."""
        memory, size = tensor.untyped_storage(), tensor.element_size()
        start = memory.data_ptr()
        storage = storages.setdefault(start, Storage(start, start + memory.nbytes(), size))
        storage.unit = min(storage.unit, size)
        place = size, tensor.data_ptr(), tensor.is_contiguous(), storage
        return cls(name, tuple(tensor.shape), tensor.stride(), *place)

    @cached_property
    def span(self) -> int:
        """Elements from the first to the last, with the gaps between them."""
        if 0 in self.shape:
            return 0
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))

    @property
    def stop(self) -> int:
        return self.start + self.span * self.size

    @cached_property
    def members(self) -> np.ndarray | None:
        """bool [span]: which elements of the span belong to the tensor; None where all do."""
        if self.contiguous:
            return None
        members = np.zeros(self.span, bool)
        np.lib.stride_tricks.as_strided(members, self.shape, self.strides)[...] = True
        return members

    def contains(self, addresses: np.ndarray, size: int) -> np.ndarray | bool:
        """Whether the `size` bytes at each address are an element of the tensor; one bool where all are."""
        low, high = int(addresses.min()), int(addresses.max())
        inside: np.ndarray | bool = self.start <= low and high + size <= self.stop
        if not inside:
            inside = (addresses >= self.start) & (addresses + size <= self.stop)
        if size != self.size or self.members is None:
            return inside
        elements = (addresses - self.start) // size
        return inside & self.members[np.clip(elements, 0, self.span - 1)] if self.span else inside

    def __str__(self) -> str:
        gaps = "" if self.members is None else f" of strides {list(self.strides)}"
        return f"{self.name} {list(self.shape)}{gaps}"


class Memory:
    """What one launch may touch and has touched.

    Args:
        races: whether to look for races between programs.
    """

    def __init__(self, races: bool) -> None:
        self.races = races
        self.views: list[View] = []
        self.storages: dict[int, Storage] = {}
        self.ticket = 0
        self.first_ticket = 0

    def add(self, tensor: torch.Tensor, name: str) -> View:
        view = View.of(tensor, name, self.storages)
        self.views.append(view)
        return view

    def begin_program(self) -> None:
        self.ticket += 1
        self.first_ticket = self.ticket

    def barrier(self) -> None:
        self.ticket += 1

    def access(self, kind: str, pointers: Any, mask: Any, size: int) -> None:
        """Check one load, store or atomic.

        Args:
            kind: "load", "store" or "atomic".
            pointers: the handle of the pointers.
            mask: bool array of their shape, or None for all lanes.
            size: bytes an element.

        Raises:
            KernelFault: what is wrong with it.
        """
        addresses = pointers.data.view(np.int64) if pointers.data.dtype == np.uint64 else pointers.data
        if mask is None or mask.all():
            addresses = addresses.ravel()
        else:
            addresses = addresses[np.broadcast_to(mask, addresses.shape)]
        if not addresses.size:
            return
        view = getattr(pointers.dtype, "view", None)
        if view is not None:
            self._check_bounds(kind, view, view.contains(addresses, size), addresses.size)
            self._record(kind, view.name, view.storage, view.storage.touched(addresses, size))
            return
        known = np.zeros(addresses.shape, bool)
        for candidate in self.views:
            known |= candidate.contains(addresses, size)
        self._check_bounds(kind, "any tensor of the launch", known, addresses.size)
        for storage in self.storages.values():
            here = addresses[(addresses >= storage.start) & (addresses < storage.stop)]
            if here.size:
                self._record(kind, "a computed pointer", storage, storage.touched(here, size))

    @staticmethod
    def _check_bounds(kind: str, where: View | str, inside: np.ndarray | bool, lanes: int) -> None:
        outside = lanes - np.count_nonzero(np.broadcast_to(inside, lanes))
        if outside:
            raise OutOfBounds(f"{kind}: {outside} of {lanes} lanes outside {where}")

    def _record(self, kind: str, name: str, storage: Storage, units: np.ndarray) -> None:
        if kind == "store":
            lanes = np.arange(units.size, dtype=np.int32)
            storage.lanes[units] = lanes
            duplicates = np.count_nonzero(storage.lanes[units] != lanes)
            if duplicates:
                raise DuplicateStore(f"store to {name}: {duplicates} lanes write what another lane writes")
        if not self.races:
            return
        writers = storage.writers[units]
        foreign = (writers != NOBODY) & (writers < self.first_ticket)
        if kind == "atomic":
            foreign &= writers != ATOMICS
        self._refuse_race(f"{kind} of {name}: another program writes", foreign)
        if kind == "load":
            self._refuse_race(
                f"load of {name}: the program itself wrote, with no barrier since,", writers == self.ticket
            )
            readers = storage.readers[units]
            alone = (readers == NOBODY) | (readers == self.first_ticket)
            storage.readers[units] = np.where(alone, self.first_ticket, SEVERAL)
            return
        readers = storage.readers[units]
        foreign = (readers != NOBODY) & (readers != self.first_ticket)
        self._refuse_race(f"{kind} of {name}: another program reads", foreign)
        if kind == "store":
            storage.writers[units] = self.ticket
        else:
            own = writers >= self.first_ticket
            storage.writers[units] = np.where(own, writers, ATOMICS)

    @staticmethod
    def _refuse_race(what: str, lanes: np.ndarray) -> None:
        if lanes.any():
            raise Race(f"{what} {np.count_nonzero(lanes)} of its {lanes.size} elements")
