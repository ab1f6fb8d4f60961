"""What is made of a pair of layouts and a mask, kept between the calls that share them."""

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

from ...checks import values_are_free
from ...layout import TokenLayout
from ...mask import AttentionMask
from ..library import traced

MOST_PAIRS = 1 << 22
"""Pairs of a row and a key up to which it is kept who attends to whom, a byte each."""

T = TypeVar("T")


class Kept(Generic[T]):
    """Tables of two layouts and a mask, on the CPU as long as both layouts live, unless they are large:
    making a small one takes longer than all else that Python does for a layer.

    Args:
        make: makes one of the attending side's layout, the attended one's, and the mask.
    """

    def __init__(self, make: Callable[[TokenLayout, TokenLayout, AttentionMask], T]) -> None:
        self.make = make
        self.tables: WeakKeyDictionary[
            TokenLayout, WeakKeyDictionary[TokenLayout, dict[AttentionMask, T]]
        ] = WeakKeyDictionary()

    def of(self, q_layout: TokenLayout, kv_layout: TokenLayout, mask: AttentionMask) -> T:
        """The table, made anew where it is not kept: for tracers, modes and transforms too."""
        pairs = q_layout.samples * sum(segment_sizes(q_layout)) * sum(segment_sizes(kv_layout))
        if traced() or not values_are_free(q_layout.device) or pairs > MOST_PAIRS:
            return self.make(q_layout, kv_layout, mask)
        kept = self.tables.setdefault(q_layout, WeakKeyDictionary()).setdefault(kv_layout, {})
        if mask not in kept:
            with torch.inference_mode(False):  # a pass with gradients may be the next that asks
                kept[mask] = self.make(q_layout, kv_layout, mask)
        return kept[mask]


def segment_sizes(layout: TokenLayout) -> list[int]:
    """Columns of a layout's rectangle that are queries', and each text segment's."""
    return [layout.num_queries, *(text.max_length for text in layout.texts)]
