"""The Querying Transformer (Q-Former) of BLIP-2 and InstructBLIP (BLIP-2 paper, section 3.1).

`QFormerModel` takes transformers' configurations and state dicts. `use_fused=False` is the readable path:
dense masks, one module after the other (`qformer_layers.py`). `use_fused=True` hands the same parameters to
`blip2_kernels.encoder.FusedEncoder`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from blip2_kernels.checks import (
    check_binary,
    check_bool,
    check_finite,
    check_int,
    check_probability,
    check_tensor,
    describe,
    home_of,
)
from blip2_kernels.encoder import ImageKeyValues, LayerCall
from blip2_kernels.encoder.modules import checkpoints, drops, qformer_reason
from blip2_kernels.encoder.owner import OwnsFusedEncoder
from blip2_kernels.encoder.padded import encode_padded, is_expanded
from blip2_kernels.layout import CAPTION_STREAM, MASK_DTYPES, TEXT_STREAM, padded_row_keys
from blip2_kernels.mask import MaskMode
from blip2_kernels.ops.philox import Site, draw_key

from .qformer_init import init_bert_weights
from .qformer_layers import DropoutContext, QFormerCache, QFormerEncoder, drop_hidden
from .qformer_masks import (
    check_attention_mask,
    dense_attention_mask,
    hides_text_only,
    text_rows_mask,
    to_four_dimensions,
    with_visible_queries,
)
from .qformer_text import FLOATING, LMHead, NormalizedTextEmbeddings, TextEmbeddings

__all__ = [
    "LMHead",
    "MaskMode",
    "QFormerCache",
    "QFormerModel",
    "QFormerOutput",
    "TextEmbeddings",
    "dense_attention_mask",
]

SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "encoder_hidden_size",
    "cross_attention_frequency",
)  # fmt: skip
INSTRUCT_MODEL_TYPES = ("instructblip_qformer", "instructblipvideo_qformer")


@dataclass
class QFormerOutput(ModelOutput):
    """What `QFormerModel.forward` returns.

    Attributes:
        last_hidden_state: [B, L, C], query rows first, then text rows.
        pooler_output: [B, C], the first row.
        past_key_values: the cache, if `use_cache` or one was given.
        hidden_states: with `output_hidden_states`, layers + 1 tensors [B, L, C], the embeddings first.
        attentions: with `output_attentions`, a tensor [B, heads, L, past + L] a layer.
        cross_attentions: with `output_attentions`, a tensor [B, heads, Q, N] a layer with cross-attention.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    past_key_values: QFormerCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class QFormerModel(OwnsFusedEncoder, nn.Module):
    """Q-Former of BLIP-2 (`Blip2QFormerConfig`) or InstructBLIP (`InstructBlipQFormerConfig`).

    State dicts of transformers' `Blip2QFormerModel` and `InstructBlipQFormerModel` load with no renaming.
    With a `Blip2QFormerConfig` the text embeddings live outside (`TextEmbeddings`) and the text feed-forward
    networks exist only if `use_qformer_text_input`; with an `InstructBlipQFormerConfig` both are inside.

    Args:
        config: transformers' configuration.
        use_fused: run through `blip2_kernels.encoder.FusedEncoder`; may be changed at any time. These still
            take the plain layers: a key/value cache, attention maps or hidden states asked for, a mask of
            three or four dimensions, a mask that hides queries.

    Raises:
        TypeError: another configuration.
        ValueError: hidden_size is no multiple of num_attention_heads, which is at least 1; no cross-attention
            frequency, or an activation that transformers does not have.
    """

    def __init__(
        self, config: Blip2QFormerConfig | InstructBlipQFormerConfig, use_fused: bool = False
    ) -> None:
        super().__init__()
        self.is_instruct = getattr(config, "model_type", None) in INSTRUCT_MODEL_TYPES
        if not (self.is_instruct or isinstance(config, Blip2QFormerConfig)):
            raise TypeError(
                f"config: expected Blip2QFormerConfig or InstructBlipQFormerConfig, got {describe(config)}"
            )
        for name in SIZES:
            check_int(f"config.{name}", getattr(config, name), 1)
        for name in ("layer_norm_eps", "initializer_range"):
            check_finite(f"config.{name}", getattr(config, name), 0)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check_probability(f"config.{name}", getattr(config, name))
        if isinstance(config.hidden_act, str) and config.hidden_act not in ACT2FN:
            raise ValueError(
                f"config.hidden_act: expected one of {', '.join(ACT2FN)}, got {config.hidden_act!r}"
            )
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                "config: expected hidden_size to be a multiple of num_attention_heads, got "
                f"{config.hidden_size} and {config.num_attention_heads}"
            )
        self.config = config
        self.use_fused = use_fused
        self.gradient_checkpointing = False
        self.has_text = self.is_instruct or config.use_qformer_text_input
        if self.is_instruct:
            self.embeddings = NormalizedTextEmbeddings(config)
        else:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = QFormerEncoder(config, self.has_text)
        init_bert_weights(self, config.initializer_range)

    @property
    def use_fused(self) -> bool:
        """Whether passes run through the fused encoder where it can serve them."""
        return self._use_fused

    @use_fused.setter
    def use_fused(self, value: bool) -> None:
        self._use_fused = check_bool("use_fused", value)

    @property
    def embedding_layernorm(self) -> nn.LayerNorm:
        """The LayerNorm that queries and embedded text pass first."""
        return self.embeddings.layernorm if self.is_instruct else self.layernorm

    @property
    def embedding_dropout(self) -> nn.Dropout:
        """The dropout behind it."""
        return self.embeddings.dropout if self.is_instruct else self.dropout

    @property
    def called_reason(self) -> str | None:
        """None where models may hand rows to `fused_encoder` past this module, else why they must call it."""
        return qformer_reason(self)

    @staticmethod
    def call_layer(layer: nn.Module, call: LayerCall) -> Tensor:
        """A `QFormerLayer` called as the module it is, for the fused encoder."""
        dropout = None
        if call.dropout_key is not None:
            image_keys = None
            if call.features is not None:
                tokens = call.features.shape[1]
                image_keys = torch.arange(tokens, dtype=torch.int32, device=call.hidden.device)
            dropout = DropoutContext(call.dropout_key, call.row_keys, call.row_keys, image_keys)
        return layer(
            call.hidden,
            call.allowed,
            call.num_queries,
            call.features,
            call.image_allowed,
            None,
            dropout,
        )[0]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Compute the layers again in the backward instead of keeping what they need, on both paths.

        Args:
            gradient_checkpointing_kwargs: as transformers passes them; checkpointing here is never reentrant.

        Raises:
            ValueError: `use_reentrant=True` is asked for.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant=False, the only kind here, got True"
            )
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward needs."""
        self.gradient_checkpointing = False

    @property
    def checkpoints(self) -> bool:
        """Whether a forward pass now would checkpoint its layers."""
        return checkpoints(self)

    @property
    def drops(self) -> bool:
        """Whether a forward pass now would apply dropout."""
        return drops(self)

    def forward(
        self,
        query_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | ImageKeyValues | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        query_length: int | None = None,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        mask: MaskMode = MaskMode.BIDIRECTIONAL,
        past_key_values: QFormerCache | None = None,
        use_cache: bool = False,
        row_keys: Tensor | None = None,
        dropout_key: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        queries_only: bool = False,
    ) -> QFormerOutput:
        """Run the Q-Former on queries, text, or both.

        L is the number of rows of this call, Q of which are queries; P the rows in `past_key_values`.
        Floating inputs are cast to the parameters' dtype, as transformers does.

        Args:
            query_embeds: [B, L, C]. With a `Blip2QFormerConfig` it holds the queries and behind them the
                embedded text (`TextEmbeddings`); with an `InstructBlipQFormerConfig` the queries only. A
                batch of one is expanded to the images' batch.
            attention_mask: 0/1, default all 1. [B, P + L] says which rows may be attended to; [B, L, P + L]
                or [B, 1 or heads, L, P + L] says it for each row. It only ever narrows `mask`.
            encoder_hidden_states: [B or 1, N, encoder_hidden_size], image features; or what
                `fused_encoder.project_images` made of them. Needed if Q > 0.
            encoder_attention_mask: 0/1, batch and N as the image features', which image tokens may be
                attended to; default all.
            query_length: Q; default all of `query_embeds`, or 0 with a filled cache. 0 is a text-only pass.
            input_ids: [B, T], `InstructBlipQFormerConfig` only.
            position_ids: [B or 1, T], with `input_ids` only; default counts from the text's first token.
            text_mask: 0/1 [B, text rows, cached ones too], instead of an `attention_mask` that hides no
                query. The fused path then need not ask the device whether one is hidden.
            mask: which of the paper's masks joins queries and text.
            past_key_values: cache of earlier rows, extended in place. A filled one takes more text under
                MULTIMODAL_CAUSAL, the only mask under which no earlier row would have seen it.
            use_cache: return the keys and values of this pass too.
            row_keys: int32 [B, P + L], logical names of the rows for dropout; default `padded_row_keys`.
            dropout_key: int64 [], Philox key; default a fresh one from torch's generator.
            output_attentions, output_hidden_states: return these too.
            queries_only: return only the query rows, [B, Q, C], so that the fused path can leave out what
                nobody reads.

        Returns:
            `QFormerOutput`. A row that may attend to nothing gets 0 from that attention. Padding rows hold
            what a row in their place would; nothing reads them. Under MULTIMODAL_CAUSAL with left or
            scattered padding they may differ between the plain and the fused path.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message.
        """
        for name, switch in (
            ("use_cache", use_cache),
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
            ("queries_only", queries_only),
        ):
            check_bool(name, switch)
        same_queries = isinstance(query_embeds, Tensor) and is_expanded(query_embeds)
        hidden, query_length = self._embed(
            query_embeds, input_ids, position_ids, query_length, past_key_values
        )
        prepared = encoder_hidden_states if isinstance(encoder_hidden_states, ImageKeyValues) else None
        if prepared is not None:
            if encoder_attention_mask is not None:
                raise ValueError(
                    "encoder_attention_mask: expected None beside ImageKeyValues, which hold theirs, got "
                    f"{describe(encoder_attention_mask)}"
                )
            encoder_hidden_states, encoder_attention_mask = prepared.features.values, prepared.mask
        image, image_mask = self._check_image(encoder_hidden_states, encoder_attention_mask, query_length)
        hidden = _expand_to_images(hidden, image)
        batch, length, _ = hidden.shape
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(mask, MaskMode):
            raise TypeError(f"mask: expected a MaskMode, got {describe(mask)}")
        if past and (query_length or mask != MaskMode.MULTIMODAL_CAUSAL):
            raise ValueError(
                "past_key_values: expected text rows only (query_length=0) under MULTIMODAL_CAUSAL behind a "
                f"filled cache, got query_length={query_length} under {mask.name}"
            )
        if past and past_key_values.layers[0].keys.shape[0] != batch:
            cached = past_key_values.layers[0].keys.shape[0]
            raise ValueError(f"past_key_values: expected a cache of {batch} samples, got one of {cached}")
        num_queries = past_key_values.num_queries if past else query_length
        heads = self.config.num_attention_heads
        plain = past_key_values is not None or use_cache or output_attentions or output_hidden_states
        fused = self.use_fused and not plain
        if text_mask is not None:
            attention_mask = with_visible_queries(
                text_mask, attention_mask, batch, num_queries, past + length
            )
        else:
            attention_mask = check_attention_mask(attention_mask, batch, heads, length, past + length)
            fused = fused and hides_text_only(attention_mask, query_length)  # a GPU's host waits for this
        text_mask = text_rows_mask(attention_mask, batch, num_queries, past + length, hidden.device)

        if self.drops or row_keys is not None:
            if row_keys is None:
                stream = CAPTION_STREAM if mask == MaskMode.MULTIMODAL_CAUSAL else TEXT_STREAM
                row_keys = padded_row_keys(
                    batch, num_queries, text_mask, text_stream=stream, device=hidden.device
                )
            check_tensor("row_keys", row_keys, [batch, past + length], [torch.int32], hidden.device)
        if dropout_key is not None:
            check_tensor("dropout_key", dropout_key, [], [torch.int64])
        elif self.drops:
            dropout_key = draw_key(hidden.device)

        if fused:
            if query_length and prepared is None:
                prepared = self.fused_encoder.project_images(
                    image, mask=image_mask, query_rows=batch * query_length
                )
            queries, text = hidden[:, :query_length], hidden[:, query_length:]
            out = encode_padded(
                self.fused_encoder,
                (queries[:1] if same_queries else queries) if query_length else None,
                text if length > query_length else None,
                samples=batch,
                text_mask=text_mask,
                images=prepared if query_length else None,
                mode=mask,
                row_keys=row_keys,
                dropout_key=dropout_key,
                queries_only=queries_only,
            )
            return QFormerOutput(last_hidden_state=out, pooler_output=out[:, 0])
        if prepared is not None and image is not None:
            image = prepared.features.behind_norm

        if self.checkpoints and (use_cache or past_key_values is not None):
            raise ValueError(
                "use_cache: expected no cache where layers are checkpointed, since they would fill it twice"
            )
        if use_cache and past_key_values is None:
            past_key_values = QFormerCache()
        if past_key_values is not None and not past:
            past_key_values.num_queries = query_length
        if image is not None:
            image = image.expand(batch, -1, -1)
        dropout = None
        if self.drops:
            image_keys = None
            if image is not None:
                image_keys = torch.arange(image.shape[1], dtype=torch.int32, device=hidden.device)
            dropout = DropoutContext(dropout_key, row_keys[:, past:], row_keys, image_keys)
        allowed = dense_attention_mask(mask, num_queries, past, length, hidden.device)
        if attention_mask is not None:
            allowed = allowed & to_four_dimensions(attention_mask)
        image_allowed = None if image_mask is None else image_mask[:, None, None, :]

        hidden = self.embedding_layernorm(hidden)
        hidden = drop_hidden(hidden, self.embedding_dropout, dropout, 0, Site.EMBEDDINGS)
        states, attentions, cross_attentions = [], [], []
        for layer in self.encoder.layer:
            # Kept only where asked for: the maps of all layers together dwarf the hidden states.
            if output_hidden_states:
                states.append(hidden)
            arguments = (hidden, allowed, query_length, image, image_allowed, past_key_values, dropout)
            if self.checkpoints:
                hidden, self_probs, cross_probs = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, self_probs, cross_probs = layer(*arguments)
            if output_attentions:
                attentions.append(self_probs)
                if cross_probs is not None:
                    cross_attentions.append(cross_probs)
        last = hidden[:, :query_length] if queries_only else hidden
        return QFormerOutput(
            last_hidden_state=last,
            pooler_output=hidden[:, 0],
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
        )

    def _embed(
        self,
        query_embeds: Tensor | None,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        query_length: int | None,
        past_key_values: QFormerCache | None,
    ) -> tuple[Tensor, int]:
        """Check the rows of a call; return them before the first LayerNorm, [B, L, C], and Q."""
        if past_key_values is not None and not isinstance(past_key_values, QFormerCache):
            raise TypeError(f"past_key_values: expected a QFormerCache, got {describe(past_key_values)}")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        width, weight = self.config.hidden_size, self.embedding_layernorm.weight
        if query_embeds is None and input_ids is None:
            raise ValueError("query_embeds: expected query_embeds or input_ids, got neither")
        if query_embeds is not None:
            check_tensor("query_embeds", query_embeds, ["batch", "rows", width], FLOATING, home_of(weight))
        rows = query_embeds.shape[1] if query_embeds is not None else 0
        if query_length is not None:
            check_int("query_length", query_length, 0, rows)
        if self.is_instruct:
            if query_length not in (None, rows):
                raise ValueError(f"query_length: expected {rows}, all of query_embeds, got {query_length}")
            query_length = rows
            if position_ids is not None and input_ids is None:
                raise ValueError("position_ids: expected input_ids beside it, got None")
            if input_ids is not None:
                before = past - past_key_values.num_queries if past else 0
                text = self.embeddings.embed(input_ids, position_ids, before).to(weight.dtype)
                if query_embeds is None:
                    return text, 0
                if query_embeds.shape[0] != text.shape[0]:
                    raise ValueError(
                        f"query_embeds: expected [{text.shape[0]}, queries, {width}] as input_ids, got "
                        f"{describe(query_embeds)}"
                    )
                return torch.cat([query_embeds.to(weight.dtype), text], dim=1), query_length
        else:
            for name, value in (("input_ids", input_ids), ("position_ids", position_ids)):
                if value is not None:
                    raise ValueError(
                        f"{name}: expected None, since this Q-Former takes text embedded, in query_embeds "
                        f"(TextEmbeddings), got {describe(value)}"
                    )
            if query_length is None:
                query_length = 0 if past else rows
            if query_length < rows and not self.has_text:
                raise ValueError(
                    f"query_length: expected {rows}, since the config has use_qformer_text_input=False, got "
                    f"{query_length}"
                )
        if rows == 0 or query_embeds.shape[0] == 0:
            raise ValueError(
                f"query_embeds: expected at least one row of one sample, got {describe(query_embeds)}"
            )
        return query_embeds.to(weight.dtype), query_length

    def _check_image(
        self, features: Tensor | None, mask: Tensor | None, query_length: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Check image features and their mask; both None in a text-only pass, which never looks at them."""
        weight = self.embedding_layernorm.weight
        if features is not None:
            shape: list[int | str] = ["batch", "tokens", self.config.encoder_hidden_size]
            check_tensor("encoder_hidden_states", features, shape, FLOATING, home_of(weight))
            if 0 in features.shape:
                raise ValueError(
                    "encoder_hidden_states: expected at least one token of one image, got "
                    f"{describe(features)}"
                )
        if mask is not None:
            if features is None:
                raise ValueError("encoder_attention_mask: expected encoder_hidden_states beside it, got None")
            check_tensor("encoder_attention_mask", mask, features.shape[:2], MASK_DTYPES, features.device)
            check_binary("encoder_attention_mask", mask)
        if query_length == 0:
            return None, None
        if features is None:
            raise ValueError(
                "encoder_hidden_states: expected image features for the queries to read, got None"
            )
        features = features.to(weight.dtype)
        return features, None if mask is None else mask != 0


def _expand_to_images(hidden: Tensor, image: Tensor | None) -> Tensor:
    """Expand a batch of one to the images' batch; refuse batches that do not go together."""
    rows, images = hidden.shape[0], 1 if image is None else image.shape[0]
    if rows not in (1, images) and images != 1:
        raise ValueError(
            f"encoder_hidden_states: expected {rows} images, one a sample, or 1 for all, got {images}"
        )
    return hidden.expand(max(rows, images), -1, -1)
