"""The whole Q-Former on packed rows."""

from torch import Tensor, nn

from ..checks import check_tensor, describe
from ..layout import TokenLayout
from ..mask import AttentionMask
from ..ops.philox import Site, draw_key
from .images import ImageKeyValues, project_images
from .layer import Dropout, Pass, run_layer


class FusedEncoder:
    """Runs a Q-Former on the rows of a `TokenLayout`.

    It holds no parameters: it reads those of the module it is given, under the names that transformers'
    `Blip2QFormerModel` and `InstructBlipQFormerModel` use, at every call. Where dropout is on, every mask
    comes from the Philox contract, so the result equals the padded plain path's in training too.

    Args:
        qformer: a Q-Former with `config`, `encoder.layer` and `layernorm` or `embeddings.layernorm`.
    """

    def __init__(self, qformer: nn.Module) -> None:
        self.qformer = qformer

    def project_images(self, features: Tensor, *, mask: Tensor | None = None) -> ImageKeyValues:
        """Keys and values of images [images, tokens, width] for every layer, once for all passes.

        Args:
            features: image features, after the image LayerNorm.
            mask: 0/1 [images, tokens] of visible tokens; default all.

        Raises:
            TypeError, ValueError: features or mask of the wrong kind, shape or width.
        """
        config = self.qformer.config
        return project_images(self.qformer.encoder.layer, config.num_attention_heads, features, mask)

    def __call__(
        self,
        rows: Tensor,
        layout: TokenLayout,
        mask: AttentionMask,
        images: ImageKeyValues | None = None,
        image_index: Tensor | None = None,
        *,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """Encode embedded rows.

        Args:
            rows: [layout.rows, hidden], query tokens and embedded text (word + position), before the first
                LayerNorm; `layout.pack` lays them out.
            layout: where the rows lie.
            mask: one mode a text segment.
            images: from `project_images`; needed wherever there are queries.
            image_index: int32 [S]; default sample s looks at image s.
            dropout_key: int64 [] from `draw_key`, so that several passes can share a step's key; default a
                new one where the Q-Former is training with dropout.

        Returns:
            [layout.rows, hidden].

        Raises:
            TypeError, ValueError: an argument of the wrong kind or shape, or parts that do not belong
                together.
        """
        config = self.qformer.config
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"layout: expected a TokenLayout, got {describe(layout)}")
        check_tensor("rows", rows, [layout.rows, config.hidden_size])
        if not isinstance(mask, AttentionMask):
            raise TypeError(f"mask: expected an AttentionMask, got {describe(mask)}")
        mask.check(layout)
        if layout.query_rows and images is None:
            raise ValueError("images: expected ImageKeyValues where there are queries, got None")
        norm = getattr(self.qformer, "layernorm", None) or self.qformer.embeddings.layernorm
        dropout = Dropout()
        if self.qformer.training and (config.hidden_dropout_prob or config.attention_probs_dropout_prob):
            key = draw_key(rows.device) if dropout_key is None else dropout_key
            dropout = Dropout(config.hidden_dropout_prob, config.attention_probs_dropout_prob, key)

        hidden = dropout.apply(norm(rows.to(norm.weight.dtype)), layout.row_keys, 0, Site.EMBEDDINGS)
        run = Pass(layout, mask, config.num_attention_heads, images, image_index, dropout)
        for number, layer in enumerate(self.qformer.encoder.layer):
            hidden = run_layer(layer, number, hidden, run)
        return hidden
