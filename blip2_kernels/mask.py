"""Who may attend to whom: the three self-attention masks of BLIP-2 (paper section 3.1, figure 2).

| mask              | query→query | query→text | text→query | text→text |
|-------------------|-------------|------------|------------|-----------|
| UNIMODAL          | full        | -          | -          | full      |
| BIDIRECTIONAL     | full        | full       | full       | full      |
| MULTIMODAL_CAUSAL | full        | -          | full       | causal    |

A mask is structure, never a tensor, in every kernel; `AttentionMask.dense` spells it out for the reference
and for plots.
"""

import enum
from dataclasses import dataclass

from torch import Tensor

from .checks import describe
from .layout import DenseRows, TokenLayout


def rectangles(q_layout: TokenLayout, kv_layout: TokenLayout) -> tuple[DenseRows, DenseRows]:
    """The rows of both as rectangles; one, twice, where both are the same layout."""
    q_rows = q_layout.dense()
    return q_rows, q_rows if kv_layout is q_layout else kv_layout.dense()


class MaskMode(enum.IntEnum):
    """One of the paper's three self-attention masks."""

    UNIMODAL = 0
    """Image-text contrastive learning: queries and text do not see each other."""
    BIDIRECTIONAL = 1
    """Image-text matching, InstructBLIP: all see all."""
    MULTIMODAL_CAUSAL = 2
    """Image-grounded text generation: text sees the queries and the text before it; queries see queries."""


@dataclass(frozen=True)
class AttentionMask:
    """The mask of a pass: one mode a text segment of its layout.

    Attributes:
        modes: `()` for queries only, one mode for one text, or `(UNIMODAL, MULTIMODAL_CAUSAL)` for the
            contrastive text and the caption side by side. Under both of these the queries see queries only,
            so one pass serves both losses; any other pair is refused. Texts of different segments never see
            each other.
    """

    modes: tuple[MaskMode, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.modes, tuple) or not all(isinstance(mode, MaskMode) for mode in self.modes):
            raise TypeError(f"modes: expected a tuple of MaskMode, got {describe(self.modes)} {self.modes!r}")
        if len(self.modes) > 1 and self.modes != (MaskMode.UNIMODAL, MaskMode.MULTIMODAL_CAUSAL):
            names = ", ".join(mode.name for mode in self.modes)
            raise ValueError(f"modes: expected one mode or (UNIMODAL, MULTIMODAL_CAUSAL), got ({names})")

    @property
    def joins_queries_and_text(self) -> bool:
        """Whether queries see text."""
        return MaskMode.BIDIRECTIONAL in self.modes

    def check(self, layout: TokenLayout, name: str = "layout") -> None:
        """Raise TypeError unless `layout` is one, ValueError unless it has one text segment a mode."""
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"{name}: expected a TokenLayout, got {describe(layout)}")
        if len(layout.texts) != len(self.modes):
            raise ValueError(
                f"{name}: expected {len(self.modes)} text segments, one a mode, got {len(layout.texts)}"
            )

    def dense(self, q_layout: TokenLayout, kv_layout: TokenLayout | None = None) -> Tensor:
        """The mask as a table over the rectangles of two layouts (see `TokenLayout.dense`).

        Args:
            q_layout: the rows that attend.
            kv_layout: the rows attended to; default the same.

        Returns:
            bool [S, Lq, Lk], True where the row may attend to the key.
        """
        kv_layout = q_layout if kv_layout is None else kv_layout
        self.check(q_layout, "q_layout")
        self.check(kv_layout, "kv_layout")
        return self.between(*rectangles(q_layout, kv_layout))

    def between(self, q: DenseRows, kv: DenseRows) -> Tensor:
        """The same between the rectangles themselves, bool [S, Lq, Lk]."""
        from_query, to_query = (q.segment < 0)[:, None], (kv.segment < 0)[None, :]
        allowed = (from_query & to_query)[None]
        for i, mode in enumerate(self.modes):
            from_text, to_text = (q.segment == i)[:, None], (kv.segment == i)[None, :]
            text_to_text = (from_text & to_text)[None]
            if mode == MaskMode.MULTIMODAL_CAUSAL:
                text_to_text = text_to_text & (kv.ordinal[:, None, :] <= q.ordinal[:, :, None])
            allowed = allowed | text_to_text
            if mode != MaskMode.UNIMODAL:
                allowed = allowed | (from_text & to_query)
            if mode == MaskMode.BIDIRECTIONAL:
                allowed = allowed | (from_query & to_text)
        return allowed & q.exists[:, :, None] & kv.real[:, None, :]
