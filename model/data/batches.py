"""Which samples make a batch, and how batches reach the ranks and the device."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from blip2_kernels.checks import check_bool, check_int, describe


class ShuffledBatches:
    """Batches of a dataset in an order that depends on nothing but the seed and the epoch.

    Args:
        length: number of samples.
        batch_size: samples a batch.
        seed: of the order; each epoch has its own.
        drop_last: leaves out the incomplete last batch, so that every contrastive batch has the same size.

    Raises:
        TypeError, ValueError: not one full batch (with `drop_last`), or a length, size or seed of the wrong
            kind or value.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int = 0, drop_last: bool = True) -> None:
        check_int("batch_size", batch_size, 1)
        check_int("length", length, 0)
        check_int("seed", seed, 0)
        check_bool("drop_last", drop_last)
        if length < (batch_size if drop_last else 1):
            raise ValueError(
                f"dataset: expected at least one batch of {batch_size} samples, got {length} samples"
            )
        self.length, self.batch_size, self.seed, self.drop_last = length, batch_size, seed, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


class RankBatches:
    """Every n-th batch of a sequence of batches, so that rank r of n gets r, r + n, …; incomplete rounds are
    left."""

    def __init__(self, batches: Any, rank: int, ranks: int) -> None:
        self.batches, self.rank, self.ranks = batches, rank, ranks

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        mine = None
        for number, batch in enumerate(self.batches):
            if number % self.ranks == self.rank:
                if isinstance(batch, str) or not isinstance(batch, Iterable):
                    raise TypeError(f"batch_sampler: expected lists of indices, got {describe(batch)}")
                mine = list(batch)
            if number % self.ranks == self.ranks - 1:
                yield mine or []


class SizedRankBatches(RankBatches):
    """The same for a sequence whose length is known."""

    def __len__(self) -> int:
        return len(self.batches) // self.ranks


class DeviceLoader(DataLoader):
    """A DataLoader whose batches are copied to the device without waiting for it."""

    target: torch.device

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if not isinstance(batch, Mapping):
                raise TypeError(
                    "collate: expected a function that returns a mapping of the model's arguments, got "
                    f"{describe(batch)}"
                )
            yield {
                name: value.to(self.target, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
