"""The plain truth: gather the rows into a rectangle, spell the mask out, attend, put the rows back."""

from torch import Tensor

from ...layout import TokenLayout
from ...mask import AttentionMask, rectangles
from ..dense_attention import attend
from ..philox import Site, dropout_attention


def self_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: TokenLayout,
    kv_layout: TokenLayout,
    mask: AttentionMask,
    *,
    dropout: float,
    dropout_key: Tensor | None,
    layer: int,
    scale: float,
) -> Tensor:
    """See `self_attention`; differentiable, deterministic on the CPU, in any floating dtype."""
    q_rows, kv_rows = rectangles(q_layout, kv_layout)
    padding = ~kv_rows.real[:, :, None, None]

    def drop(probs: Tensor) -> Tensor:
        keys = (dropout_key, q_rows.row_keys, kv_rows.row_keys)
        return dropout_attention(probs, dropout, *keys, layer=layer, site=Site.SELF_ATTENTION)

    context = attend(
        q_rows.spread(q).transpose(1, 2),
        # 0 · NaN would leak out of padding rows, so they are blanked, not only masked.
        kv_rows.spread(k).masked_fill(padding, 0).transpose(1, 2),
        kv_rows.spread(v).masked_fill(padding, 0).transpose(1, 2),
        mask.between(q_rows, kv_rows)[:, None],
        scale,
        drop if dropout > 0 else None,
    )
    return q_rows.collect(context.transpose(1, 2))
