"""Stage 1 of BLIP-2: representation learning from image-text pairs (paper section 3.1).

Three losses over one Q-Former: contrast (ITC), matching (ITM) and image-grounded text generation (ITG), those
of LAVIS's `blip2_qformer.py`. Where a rank stands alone nothing is gathered and both sides of the contrast
get their gradient. As in LAVIS's BLIP-2 (and unlike BLIP) the temperature is not clamped.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from blip2_kernels.checks import check_tensor, describe, values_are_free
from blip2_kernels.encoder import Saving
from blip2_kernels.layout import CAPTION_STREAM, TEXT_STREAM, Selection, TextSegment
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.ops.philox import draw_key

from .base import Blip2Base, PreparedImages
from .config import Blip2PreTrainingConfig
from .distributed import all_gather, all_gather_with_grad, check_same_batch, get_rank, get_world_size
from .losses import (
    IGNORE_INDEX,
    caption_labels,
    caption_loss,
    contrastive_loss,
    contrastive_similarities,
    matching_loss,
)
from .negatives import INDEX_DTYPES, Negatives, check_negatives, positive_pairs, sample_hard_negatives
from .qformer import LMHead
from .qformer_init import init_bert_weights

LOSSES = ("itc", "itm", "itg")
"""Contrast, matching and generation."""


@dataclass
class Blip2PreTrainingOutput(ModelOutput):
    """What a step of stage 1 returns; n = world size * B.

    Attributes:
        loss: [], the sum of the three, or of those that were asked for; the others and their figures are
            None.
        loss_itc, loss_itm, loss_itg: [], this rank's share: the mean over ranks is the loss of the batch.
        query_hidden: [B, Q, C], the queries' last hidden states, having read the image and no text.
        image_embeds: [B, Q, E], contrastive image features of length 1.
        text_embeds: [B, E], contrastive text features of length 1.
        sim_i2t: [B, n], own images against all texts: best query, divided by the temperature.
        sim_t2i: [B, n], own texts against all images.
        itm_logits: [S, 2], (no match, match). S = 3 B: the pairs, (negative image, text), (image, negative
            text). On the fused path with several ranks the middle part holds instead the texts, of any rank,
            that drew an image of this rank.
        itm_labels: int64 [S]: 1, 0, or -100 where there was no negative.
        negatives: `(image_index, text_index)`, int64 [B] each: the sample of all ranks whose image or text
            served as negative, -1 for none.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_itg: Tensor | None = None
    query_hidden: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    sim_i2t: Tensor | None = None
    sim_t2i: Tensor | None = None
    itm_logits: Tensor | None = None
    itm_labels: Tensor | None = None
    negatives: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class UnimodalPasses:
    """What contrast and generation need from the encoder.

    Attributes:
        query_hidden: [B, Q, C], the queries having read the image.
        text_hidden: [B, C], the texts' first token having read the text; None without contrast.
        caption_hidden: [rows, C], caption rows having read image and earlier caption; None without
            generation.
        caption_labels: int64 [rows], what each should predict, or -100; None without generation.
    """

    query_hidden: Tensor
    text_hidden: Tensor | None = None
    caption_hidden: Tensor | None = None
    caption_labels: Tensor | None = None


def _check_losses(losses: object) -> frozenset[str]:
    expected = f"at least one of {', '.join(map(repr, LOSSES))}"
    if isinstance(losses, str) or not isinstance(losses, Collection):
        raise TypeError(f"losses: expected a collection with {expected}, got {describe(losses)}")
    if not losses or not all(loss in LOSSES for loss in losses):
        raise ValueError(f"losses: expected {expected}, got {losses!r}")
    return frozenset(losses)


def _check_same_on_ranks(
    tensors: dict[str, Tensor], image_ids: Tensor | None, negatives: object, losses: frozenset[str]
) -> None:
    dtypes = ("None", *map(str, INDEX_DTYPES))
    choices: dict[str, tuple[str, tuple[str, ...]]] = {
        "input_ids": (str(tensors["input_ids"].dtype), dtypes),
        "image_ids": ("None" if image_ids is None else str(image_ids.dtype), dtypes),
        "negatives": ("drawn" if negatives is None else "given", ("drawn", "given")),
    }
    for loss in LOSSES:
        choices[f"losses ({loss})"] = (str(loss in losses), ("True", "False"))
    check_same_batch(tensors, choices)


class Blip2ForPreTraining(Blip2Base):
    """BLIP-2 in stage 1.

    Parameters are those of `Blip2Base`, the language-modelling head `cls.predictions.*` (its decoder is the
    word embedding) and the temperature `temp`. The image encoder is frozen: it never trains, whatever mode
    the model is in.

    Args:
        config: stage-1 configuration.
        vision_model: frozen image encoder, pixel values to features [B, N, encoder_hidden_size]; None where
            callers pass `image_features`.
        use_fused: False runs the four passes of LAVIS one after the other (image, text, matching, caption
            through the image pass's key/value cache); True runs two passes of the fused encoder on packed
            rows, with image keys and values projected once. May be changed at any time; losses, gradients
            and, in training mode, dropout masks are the same.

    Raises:
        TypeError: a configuration or image encoder of another kind.
    """

    def __init__(
        self,
        config: Blip2PreTrainingConfig,
        *,
        vision_model: nn.Module | None = None,
        use_fused: bool = False,
    ) -> None:
        super().__init__(config, vision_model=vision_model, use_fused=use_fused)
        self.cls = nn.ModuleDict({"predictions": LMHead(config.qformer)})
        init_bert_weights(self.cls, config.qformer.initializer_range)
        self.temp = nn.Parameter(torch.tensor(float(config.temperature)))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_ids: Tensor | None = None,
        negatives: Negatives | None = None,
        losses: Collection[str] = LOSSES,
    ) -> Blip2PreTrainingOutput:
        """One step on B image-text pairs.

        With a process group every rank calls this with the same shapes, losses and optional arguments;
        contrast and negatives then reach over all ranks (n = world size * B samples, rank r owns r * B …
        r * B + B - 1).

        Args:
            input_ids: int64 or int32 [B, T], [CLS] text [SEP] and padding. [DEC] takes the place of the first
                token where the text is to be generated.
            attention_mask: 0/1 [B, T]; the first column must be 1. On the CPU, whatever the device of the
                others, it saves the fused path a synchronisation.
            pixel_values: what `vision_model` takes, or
            image_features: floating [B, N, encoder_hidden_size], the frozen encoder's output before
                `ln_vision`, of any floating dtype; it is cast to that of `ln_vision`.
            image_ids: integers [B], equal where pairs show the same image: these count as positives in the
                contrast and are never drawn as negatives. Default: all images differ.
            negatives: `(image_index, text_index)`, integers [B] each, in [0, n) or -1 for none, instead of
                drawn ones.
            losses: which of "itc", "itm" and "itg" to compute, at least one. What belongs to the others is
                None in the output, and passes that only they need are not run.

        Returns:
            `Blip2PreTrainingOutput`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message. Values
            (of masks, ids, negatives) are looked at on the CPU only.
        """
        wanted = _check_losses(losses)
        attention_mask = self._check_batch(input_ids, attention_mask, image_ids)
        features = self.frozen_features(image_features, pixel_values)
        batch, name = input_ids.shape[0], "pixel_values" if image_features is None else "image_features"
        if features.shape[0] != batch:
            raise ValueError(f"{name}: expected {batch} images, one a text, got {features.shape[0]}")
        if features.device != input_ids.device:
            raise ValueError(f"{name}: expected a tensor on {input_ids.device}, got one on {features.device}")
        _check_same_on_ranks({"input_ids": input_ids, name: features}, image_ids, negatives, wanted)
        positives = positive_pairs(batch, image_ids, device=input_ids.device)
        if negatives is not None:
            negatives = check_negatives(negatives, positives)

        # Seen by the pass of contrast and captions, and by the three parts of matching.
        images = self.prepare_images(features, samples=4 * batch)
        dropout_key = draw_key(input_ids.device) if self.qformer.drops else None
        query_hidden = None
        contrast = "itc" in wanted or ("itm" in wanted and negatives is None)
        generate = "itg" in wanted
        if contrast or generate:
            encode = self._encode_together if self.packs else self._encode_in_turn
            passes = encode(images, input_ids, attention_mask, dropout_key, contrast, generate)
            query_hidden = passes.query_hidden

        smoothing = self.config.label_smoothing
        image_embeds = text_embeds = sim_i2t = sim_t2i = itm_logits = itm_labels = None
        parts: dict[str, Tensor] = {}
        if contrast:
            image_embeds = self.project_image(passes.query_hidden)
            text_embeds = self.project_text(passes.text_hidden)
            sim_i2t, sim_t2i = contrastive_similarities(
                image_embeds, text_embeds, self.temp, gradient=self.config.itc_gradient
            )
        if "itc" in wanted:
            parts["loss_itc"] = contrastive_loss(sim_i2t, sim_t2i, positives, label_smoothing=smoothing)
        if "itm" in wanted:
            if negatives is None:
                negatives = sample_hard_negatives(sim_i2t, sim_t2i, positives)
            itm_logits, itm_labels = self._match_pairs(
                images, input_ids, attention_mask, negatives, dropout_key
            )
            parts["loss_itm"] = matching_loss(itm_logits, itm_labels)
        if generate:
            parts["loss_itg"] = caption_loss(
                self.cls["predictions"](passes.caption_hidden, self.embeddings.word_embeddings.weight),
                passes.caption_labels,
                label_smoothing=smoothing,
                normalisation=self.config.lm_normalisation,
            )
        return Blip2PreTrainingOutput(
            loss=torch.stack(list(parts.values())).sum(),
            **parts,
            query_hidden=query_hidden,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            itm_logits=itm_logits,
            itm_labels=itm_labels,
            negatives=negatives if "itm" in wanted else None,
        )

    def caption(
        self, image_features: Tensor | None = None, pixel_values: Tensor | None = None, **options: Any
    ) -> Any:
        """Caption images with this model; arguments, result and errors as `captioning.generate_captions`."""
        from .captioning import generate_captions

        return generate_captions(self, image_features=image_features, pixel_values=pixel_values, **options)

    def _check_batch(self, input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor | None) -> Tensor:
        """Check the text side of a batch; return the mask as int64."""
        if attention_mask is None:
            raise TypeError("attention_mask: expected a 0/1 tensor as input_ids, got None")
        self.check_text(input_ids, attention_mask)
        batch = input_ids.shape[0]
        attention_mask = (attention_mask != 0).long()
        if values_are_free(attention_mask.device) and not bool(attention_mask[:, 0].all()):
            row = int((attention_mask[:, 0] == 0).nonzero()[0])
            raise ValueError(
                "attention_mask: expected 1 in the first column, where [CLS] and [DEC] stand (pad on the "
                f"right), got 0 in row {row}"
            )
        if image_ids is not None:
            check_tensor("image_ids", image_ids, [batch], INDEX_DTYPES, input_ids.device)
        return attention_mask if self.packs else attention_mask.to(input_ids.device)

    def _caption_ids(self, input_ids: Tensor) -> Tensor:
        """The texts with [DEC] in place of their first token."""
        return torch.cat([torch.full_like(input_ids[:, :1], self.config.dec_token_id), input_ids[:, 1:]], 1)

    def _encode_in_turn(
        self,
        images: PreparedImages,
        input_ids: Tensor,
        attention_mask: Tensor,
        dropout_key: Tensor | None,
        contrast: bool,
        generate: bool,
    ) -> UnimodalPasses:
        """Image, text and caption as three padded passes; the caption reads the image pass's cache."""
        queries = self.query_tokens.expand(len(images), -1, -1)
        # A checkpointed layer would fill the cache a second time: then the caption reads the image itself.
        cached = generate and not self.qformer.checkpoints
        image = self.qformer(
            queries, encoder_hidden_states=images.features, use_cache=cached, dropout_key=dropout_key
        )
        text_hidden = caption_hidden = labels = None
        if contrast:
            text_hidden = self.text_hidden(input_ids, attention_mask, dropout_key=dropout_key)
        if generate:
            num_queries = self.config.num_query_tokens
            text = self.embeddings(self._caption_ids(input_ids))
            caption = self.qformer(
                text if cached else torch.cat([queries.to(text.dtype), text], dim=1),
                F.pad(attention_mask, (num_queries, 0), value=1),
                encoder_hidden_states=None if cached else images.features,
                query_length=0 if cached else num_queries,
                mask=MaskMode.MULTIMODAL_CAUSAL,
                past_key_values=image.past_key_values,
                dropout_key=dropout_key,
            )
            caption_hidden = caption.last_hidden_state[:, -text.shape[1] :].flatten(0, 1)
            labels = caption_labels(input_ids, attention_mask, self.config.pad_token_id).flatten()
        return UnimodalPasses(image.last_hidden_state, text_hidden, caption_hidden, labels)

    def _encode_together(
        self,
        images: PreparedImages,
        input_ids: Tensor,
        attention_mask: Tensor,
        dropout_key: Tensor | None,
        contrast: bool,
        generate: bool,
    ) -> UnimodalPasses:
        """The same as one packed pass over [queries | text | caption]: under both masks queries see queries
        only, and the two texts never see each other."""
        encoder = self.qformer.fused_encoder
        contrast_mode = (TEXT_STREAM, MaskMode.UNIMODAL, "first")
        segments: list[tuple[int, MaskMode, Selection]] = [contrast_mode] if contrast else []
        if generate:
            segments.append((CAPTION_STREAM, MaskMode.MULTIMODAL_CAUSAL, "all"))
        text_hidden = None
        if len(segments) > 1 and not encoder.uses(Saving.ONE_PASS):
            text_hidden = self.text_hidden(input_ids, attention_mask, dropout_key=dropout_key)
            del segments[0]
        streams, modes, keep = zip(*segments, strict=True)
        layout = self.text_layout(
            self.config.num_query_tokens,
            [attention_mask] * len(segments),
            text_streams=streams,
            device=input_ids.device,
        )
        ids = {TEXT_STREAM: input_ids, CAPTION_STREAM: self._caption_ids(input_ids)}
        encoded = encoder(
            self.query_tokens,
            [ids[stream] for stream in streams],
            layout,
            AttentionMask(modes),
            images.key_values,
            embeddings=self.embeddings,
            keep_texts=keep,
            dropout_key=dropout_key,
        )
        if contrast and text_hidden is None:
            text_hidden = encoded.text(0)
        caption_hidden = labels = None
        if generate:
            mask = attention_mask.to(input_ids.device, non_blocking=True)
            padded = caption_labels(input_ids, mask, self.config.pad_token_id)
            labels = padded.flatten()[layout.texts[-1].source]
            caption_hidden = encoded.text(len(segments) - 1)
            if encoder.uses(Saving.SUPERVISED_ROWS) and not layout.padded:
                rows = _all_but_the_last(layout.texts[-1])
                caption_hidden, labels = caption_hidden[rows], labels[rows]
        return UnimodalPasses(encoded.queries, text_hidden, caption_hidden, labels)

    def _match_pairs(
        self,
        images: PreparedImages,
        input_ids: Tensor,
        attention_mask: Tensor,
        negatives: Negatives,
        dropout_key: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [S, 2] and labels [S] of the pairs, (negative image, text) and (image, negative text)."""
        batch = input_ids.shape[0]
        start = get_rank() * batch
        own = torch.arange(start, start + batch, device=input_ids.device)
        # Where there is no negative the sample's own image or text fills the row, which then has no label.
        labels = [torch.where(index < 0, IGNORE_INDEX, 0) for index in negatives]
        image_index, text_index = (torch.where(index < 0, own, index) for index in negatives)
        attention_mask = attention_mask.to(input_ids.device, non_blocking=True)
        all_ids, all_masks = all_gather(input_ids), all_gather(attention_mask)

        texts, first_image = own, 0
        if self.packs and get_world_size() > 1:
            # A drawn image may live on another rank. The text is a few integers, the image a thousand vectors
            # with keys and values: so the text goes to the image's rank.
            every_image, every_label = all_gather(image_index), all_gather(labels[0])
            texts = ((every_image >= start) & (every_image < start + batch)).nonzero()[:, 0]
            image_index, labels[0], first_image = every_image[texts], every_label[texts], start
        elif not self.packs:
            images = PreparedImages(all_gather_with_grad(images.features))

        text_rows = torch.cat([own, texts, text_index])
        hidden = self.multimodal_hidden(
            images,
            all_ids[text_rows],
            all_masks[text_rows],
            image_index=torch.cat([own, image_index, own]) - first_image,
            first_sample=batch,
            dropout_key=dropout_key,
        )
        return self.match(hidden), torch.cat([torch.ones_like(own), *labels])


def _all_but_the_last(text: TextSegment) -> Tensor:
    """Row numbers int64, within a packed segment, of all rows but each sample's last, which predicts nothing;
    no sample may be empty. No synchronisation."""
    samples = torch.arange(len(text.lengths), device=text.lengths.device)
    sample = torch.repeat_interleave(
        samples, text.lengths.long() - 1, output_size=text.rows - len(text.lengths)
    )
    return torch.arange(len(sample), device=sample.device) + sample
