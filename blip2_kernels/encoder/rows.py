"""What an encoder pass gives."""

from dataclasses import dataclass

from torch import Tensor

from ..layout import TokenLayout


@dataclass(frozen=True)
class EncodedRows:
    """What a pass gives.

    Attributes:
        rows: [layout.rows, hidden].
        layout: where they lie: that of the pass, without the rows that were not kept.
    """

    rows: Tensor
    layout: TokenLayout

    @property
    def queries(self) -> Tensor:
        """[S, Q, hidden]."""
        return self.layout.unpack_queries(self.rows)

    def text(self, segment: int = 0) -> Tensor:
        """The rows of a text segment, [its rows, hidden]."""
        start = self.layout.text_start(segment)
        return self.rows[start : start + self.layout.texts[segment].rows]

    def padded_text(self, segment: int = 0) -> Tensor:
        """The same in their padded places, [S, width, hidden]; 0 where padding was dropped."""
        return self.layout.unpack_text(self.rows, segment)
