"""What every stage-1 model shares: the parameters around the Q-Former and its three ways of reading.

Image alone (ITC, captions), text alone (ITC), image and text together (ITM): paper section 3.1, figure 2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_kernels.checks import (
    check_binary,
    check_int,
    check_range,
    check_tensor,
    describe,
    home_of,
    values_are_free,
)
from blip2_kernels.encoder import ImageKeyValues, Saving
from blip2_kernels.layout import MASK_DTYPES, MAX_ORDINALS, TokenLayout, padded_row_keys
from blip2_kernels.mask import AttentionMask, MaskMode

from .config import Blip2PreTrainingConfig
from .image_reading import ReadsImages
from .qformer import QFormerModel, TextEmbeddings
from .qformer_init import copy_text_feed_forward_to_query, init_bert_weights
from .qformer_text import FLOATING, TOKEN_IDS, check_text_length


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class PreparedImages:
    """A set of images as the Q-Former reads them; made once, read by any number of passes.

    Attributes:
        features: [I, N, width], behind `ln_vision`, projected in every pass (plain path), or None.
        mask: 0/1 [I, N] of the image tokens, or None for all.
        key_values: what the fused encoder made of them (fused path), or None.
    """

    features: Tensor | None
    mask: Tensor | None = None
    key_values: ImageKeyValues | None = None

    def __len__(self) -> int:
        return self.features.shape[0] if self.key_values is None else self.key_values.images


class Blip2Base(ReadsImages):
    """Q-Former with query tokens, text embeddings, image LayerNorm, contrastive projections and matching
    head.

    Parameters: `query_tokens`, `embeddings.*`, `ln_vision.*`, `qformer.*`, `vision_projection.*`,
    `text_projection.*`, `itm_head.*`, named as in transformers' `Blip2ForImageTextRetrieval` (`ln_vision`,
    which transformers counts as part of the image encoder, as in LAVIS). They start as LAVIS's: BERT N(0,
    0.02) in Q-Former and embeddings, query feed-forward networks equal to the text ones, query tokens N(0,
    0.02), PyTorch's own initialisation in projections and head.

    Args:
        config: stage-1 configuration.
        vision_model: a `FrozenVisionEncoder`, or an image encoder (of transformers, timm or another) to make
            one of: frozen, always in eval mode. None where callers pass `image_features`. If it brings a
            trained `ln_vision` along, that is where this one starts.
        use_fused: run through the fused encoder; may be changed at any time.

    Raises:
        TypeError: a configuration of another kind, or a `vision_model` that is no module.
        ValueError: the Q-Former's configuration has no text input, or reads another width than the image
            encoder's.
    """

    def __init__(
        self,
        config: Blip2PreTrainingConfig,
        *,
        vision_model: nn.Module | None = None,
        use_fused: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, Blip2PreTrainingConfig):
            raise TypeError(f"config: expected a Blip2PreTrainingConfig, got {describe(config)}")
        qformer = config.qformer
        if not getattr(qformer, "use_qformer_text_input", False):
            raise ValueError("config: expected a qformer with use_qformer_text_input=True, got False")
        check_int("config.num_query_tokens", config.num_query_tokens, 1, MAX_ORDINALS)
        check_int("config.image_text_hidden_size", config.image_text_hidden_size, 1)
        self.config = config
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, qformer.hidden_size))
        self.embeddings = TextEmbeddings(qformer)
        self.ln_vision = nn.LayerNorm(qformer.encoder_hidden_size)
        self.attach_vision_model(vision_model)
        self.qformer = QFormerModel(qformer, use_fused=use_fused)
        self.vision_projection = nn.Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.text_projection = nn.Linear(qformer.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(qformer.hidden_size, 2)
        nn.init.normal_(self.query_tokens, std=qformer.initializer_range)
        init_bert_weights(self.embeddings, qformer.initializer_range)
        copy_text_feed_forward_to_query(self.qformer)

    @property
    def _home(self) -> torch.device | None:
        """Where tensors must live: with the parameters."""
        return home_of(self.query_tokens)

    def prepare_images(
        self,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        samples: int | None = None,
    ) -> PreparedImages:
        """Get images ready to be read.

        Args:
            image_features: [B, N, width], the frozen encoder's output before `ln_vision`; or
            pixel_values: floating [B, channels, height, width], what the image encoder takes.
            image_mask: 0/1 [B, N], image tokens that may be read; default all.
            samples: how many will read them, in all passes together: tells the fused path whether keys and
                values are worth making. Default: they are.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value.
        """
        if samples is not None:
            check_int("samples", samples, 0)
        features = self.frozen_features(image_features, pixel_values)
        if image_mask is not None:
            check_tensor("image_mask", image_mask, features.shape[:2], MASK_DTYPES, features.device)
            check_binary("image_mask", image_mask)
        if not self.packs:
            return PreparedImages(self.ln_vision(features.to(self.ln_vision.weight.dtype)), image_mask)
        key_values = self.qformer.fused_encoder.project_images(
            features,
            norm=self.ln_vision,
            mask=image_mask,
            query_rows=None if samples is None else samples * self.config.num_query_tokens,
        )
        return PreparedImages(None, image_mask, key_values)

    def image_hidden(self, images: PreparedImages, *, dropout_key: Tensor | None = None) -> Tensor:
        """What the queries read from each image, [I, Q, C].

        Raises:
            TypeError, ValueError: images that `prepare_images` did not make, or a key of the wrong kind.
        """
        _check_prepared(images)
        _check_dropout_key(dropout_key)
        queries = self.query_tokens.expand(len(images), -1, -1)
        if images.key_values is None:
            return self.qformer(
                queries,
                encoder_hidden_states=images.features,
                encoder_attention_mask=images.mask,
                dropout_key=dropout_key,
            ).last_hidden_state
        layout = TokenLayout.from_attention_masks(
            queries.shape[1], samples=len(images), device=queries.device
        )
        return self.qformer.fused_encoder(
            self.query_tokens, (), layout, AttentionMask(), images.key_values, dropout_key=dropout_key
        ).queries

    def text_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, dropout_key: Tensor | None = None
    ) -> Tensor:
        """What each text's first real token ([CLS]) knows, having read the text alone, [B, C].

        Raises:
            TypeError, ValueError: ids or mask of the wrong kind, shape or value; (on the CPU) a text without
            a real token.
        """
        attention_mask = self.check_text(input_ids, attention_mask)
        _check_dropout_key(dropout_key)
        if values_are_free(attention_mask.device) and not bool(attention_mask.any(dim=1).all()):
            row = int((attention_mask != 0).any(dim=1).logical_not().nonzero()[0])
            raise ValueError(f"attention_mask: expected a 1 in every row, got none in row {row}")
        if not self.packs:
            hidden = self.qformer(
                self.embeddings(input_ids),
                attention_mask,
                query_length=0,
                mask=MaskMode.UNIMODAL,
                dropout_key=dropout_key,
            ).last_hidden_state
            first = (attention_mask != 0).to(torch.uint8).argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), first]
        layout = self.text_layout(0, [attention_mask], device=input_ids.device)
        encoded = self.qformer.fused_encoder(
            None,
            [input_ids],
            layout,
            AttentionMask((MaskMode.UNIMODAL,)),
            embeddings=self.embeddings,
            keep_texts=("first",),
            dropout_key=dropout_key,
        )
        return encoded.rows

    def text_layout(self, num_queries: int, masks: Sequence[Tensor], **options: Any) -> TokenLayout:
        """The layout of a fused pass; with padding where static shapes are wanted (`packed_text` forced off).

        Arguments and errors as `TokenLayout.from_attention_masks`.
        """
        padded = not self.qformer.fused_encoder.uses(Saving.PACKED_TEXT)
        return TokenLayout.from_attention_masks(num_queries, masks, padded=padded, **options)

    def multimodal_hidden(
        self,
        images: PreparedImages,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        first_sample: int = 0,
        dropout_key: Tensor | None = None,
    ) -> Tensor:
        """What the queries know having read an image and a text together, [S, Q, C].

        Args:
            images: the images.
            input_ids: integers [S, T].
            attention_mask: 0/1 [S, T]; default all 1.
            image_index: integers [S] in [0, number of images); default image s for text s.
            first_sample: number of the first sample in the row keys of dropout.
            dropout_key: int64 [], Philox key; default a fresh one.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value.
        """
        _check_prepared(images)
        attention_mask = self.check_text(input_ids, attention_mask)
        _check_dropout_key(dropout_key)
        check_int("first_sample", first_sample, 0)
        samples = input_ids.shape[0]
        if image_index is None:
            if len(images) != samples:
                raise ValueError(
                    f"image_index: expected one for {len(images)} images and {samples} texts, got None"
                )
        else:
            check_tensor("image_index", image_index, [samples], TOKEN_IDS)
            check_range("image_index", image_index, len(images))
        num_queries = self.query_tokens.shape[1]
        if images.key_values is None:
            text = self.embeddings(input_ids)
            queries = self.query_tokens.expand(samples, -1, -1)
            features, mask = images.features, images.mask
            if image_index is not None:
                features, mask = features[image_index], None if mask is None else mask[image_index]
            return self.qformer(
                torch.cat([queries.to(text.dtype), text], dim=1),
                F.pad(attention_mask, (num_queries, 0), value=1),
                features,
                mask,
                query_length=num_queries,
                row_keys=padded_row_keys(samples, num_queries, attention_mask, first_sample=first_sample),
                dropout_key=dropout_key,
            ).last_hidden_state[:, :num_queries]
        layout = self.text_layout(
            num_queries, [attention_mask], first_sample=first_sample, device=input_ids.device
        )
        return self.qformer.fused_encoder(
            self.query_tokens,
            [input_ids],
            layout,
            AttentionMask((MaskMode.BIDIRECTIONAL,)),
            images.key_values,
            None if image_index is None else image_index.to(torch.int32),
            embeddings=self.embeddings,
            keep_texts=("none",),
            dropout_key=dropout_key,
        ).queries

    def check_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Check token ids [B, T] and their 0/1 mask; return the mask, all 1 by default.

        Raises:
            TypeError, ValueError: wrong kind or shape, an empty batch or text, more columns than the position
            table has rows, (on the CPU) mask values other than 0 and 1, an id out of range.
        """
        check_tensor("input_ids", input_ids, ["batch", "tokens"], TOKEN_IDS, self._home)
        if 0 in input_ids.shape:
            raise ValueError(f"input_ids: expected at least one token of one text, got {describe(input_ids)}")
        check_text_length("input_ids", input_ids, self.config.qformer.max_position_embeddings)
        check_range("input_ids", input_ids, self.embeddings.word_embeddings.num_embeddings)
        if attention_mask is None:
            return torch.ones_like(input_ids)
        check_tensor("attention_mask", attention_mask, input_ids.shape, MASK_DTYPES)
        if attention_mask.device.type not in ("cpu", input_ids.device.type):
            raise ValueError(
                f"attention_mask: expected a tensor on {input_ids.device} or on the CPU, got one on "
                f"{attention_mask.device}"
            )
        check_binary("attention_mask", attention_mask)
        return attention_mask

    def project_image(self, hidden: Tensor) -> Tensor:
        """Contrastive features of the queries, [..., E] of length 1, from hidden states [..., C]."""
        self._check_hidden("hidden", hidden)
        return F.normalize(self.vision_projection(hidden), dim=-1)

    def project_text(self, hidden: Tensor) -> Tensor:
        """Contrastive features of the texts' first tokens, [..., E] of length 1, from hidden states
        [..., C]."""
        self._check_hidden("hidden", hidden)
        return F.normalize(self.text_projection(hidden), dim=-1)

    def match(self, multimodal_hidden: Tensor) -> Tensor:
        """ITM logits (no match, match), [S, 2], of hidden states [S, Q, C]: the head on every query,
        averaged."""
        self._check_hidden("multimodal_hidden", multimodal_hidden, ["samples", "queries"])
        return self.itm_head(multimodal_hidden).mean(dim=1)

    def _check_hidden(self, name: str, hidden: Tensor, front: Sequence[str] | None = None) -> None:
        if front is None:
            front = ["..."] * (hidden.dim() - 1) if isinstance(hidden, Tensor) else ["..."]
        check_tensor(name, hidden, [*front, self.config.qformer.hidden_size], FLOATING, self._home)

    def encode_image(
        self,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """What the queries read from each image, [B, Q, C]; arguments and errors as `prepare_images`."""
        features = self.frozen_features(image_features, pixel_values)
        return self.image_hidden(self.prepare_images(features, None, image_mask, samples=len(features)))

    def get_image_features(
        self,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """Contrastive image features [B, Q, E] of length 1; arguments and errors as `prepare_images`."""
        return self.project_image(self.encode_image(image_features, pixel_values, image_mask))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Contrastive text features [B, E] of length 1, of token ids [B, T] that start with [CLS].

        Raises:
            TypeError, ValueError: ids or mask of the wrong kind, shape or value, or longer than the position
            table.
        """
        return self.project_text(self.text_hidden(input_ids, attention_mask))

    def get_multimodal_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """What the queries know having read image and text together, [S, Q, C] (LAVIS's mode "multimodal").

        Arguments and errors as `prepare_images` and `multimodal_hidden`.
        """
        samples = len(input_ids) if isinstance(input_ids, Tensor) else None
        images = self.prepare_images(image_features, pixel_values, image_mask, samples=samples)
        return self.multimodal_hidden(images, input_ids, attention_mask, image_index=image_index)


def _check_prepared(images: object) -> None:
    if not isinstance(images, PreparedImages):
        raise TypeError(f"images: expected PreparedImages from prepare_images, got {describe(images)}")


def _check_dropout_key(dropout_key: object) -> None:
    if dropout_key is not None:
        check_tensor("dropout_key", dropout_key, [], [torch.int64])
