"""Stage 2 of BLIP-2: generative learning through a frozen language model (paper, section 3.3 and figure 3).

What the Q-Former read from an image is put in front of the text as a soft prompt (`soft_prompt.py`). A
decoder-only model continues it; an encoder-decoder gets soft prompt and prefix in its encoder and the rest of
the text as its decoder's labels. Language model and image encoder are never trained, but gradients flow
through the language model into the projection.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2VisionModel,
    InstructBlipVisionModel,
)
from transformers.utils import ModelOutput

from blip2_kernels.checks import check_binary, check_range, check_tensor, describe
from blip2_kernels.encoder import Saving
from blip2_kernels.layout import MASK_DTYPES

from .base import Blip2Base
from .generate_options import check_generate_options, limit_new_tokens
from .generation_config import Blip2GenerationConfig
from .language_model import check_language_model, position_limit
from .qformer_text import TOKEN_IDS
from .soft_prompt import SoftPromptModel, check_text, copy_weights
from .supervised_rows import supervised_row_loss
from .text_rows import (
    front_order,
    labels_behind_prompt,
    move_padding_to_front,
    split_prefix,
    texts_as_given,
)
from .vision import FrozenVisionEncoder

__all__ = ["Blip2ForConditionalGeneration", "Blip2GenerationConfig", "Blip2GenerationOutput"]


@dataclass
class Blip2GenerationOutput(ModelOutput):
    """What `Blip2ForConditionalGeneration.forward` returns.

    Attributes:
        loss: [], mean cross-entropy over the supervised tokens; None without labels.
        logits: decoder-only [B, Q + T, V], soft prompt first, then the text as it was given; encoder-decoder
            [B, T_out, V]. None where `use_fused` computed them for the supervised rows only.
        soft_prompt: [B, Q, D], what the language model saw of the image.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    soft_prompt: Tensor | None = None


class Blip2ForConditionalGeneration(SoftPromptModel):
    """Image encoder, Q-Former, projection and language model; the first and the last frozen.

    Parameters: `query_tokens`, `ln_vision.*`, `qformer.*`, `language_projection.*` are trained;
    `vision_model.*` and `language_model.*` get `requires_grad=False` and stay in eval mode whatever `train()`
    says. State dicts of transformers' `Blip2ForConditionalGeneration` and
    `InstructBlipForConditionalGeneration` load as they are (their `vision_model.post_layernorm` is
    `ln_vision`).

    Args:
        config: `Blip2GenerationConfig`, or transformers' `Blip2Config` or `InstructBlipConfig`.
        language_model: an `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` model; frozen here.
        vision_model: a `FrozenVisionEncoder`, or a module to make one of; None where callers pass
            `image_features`. If it brings a trained `ln_vision` along, that is where this one starts.
        use_fused: run the Q-Former through the fused encoder and the head of the language model on supervised
            rows only; may be changed at any time.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a stage-1 configuration, or parts whose widths do not fit.
    """

    def __init__(
        self,
        config: Any,
        *,
        language_model: nn.Module,
        vision_model: nn.Module | None = None,
        use_fused: bool = False,
    ) -> None:
        check_language_model(language_model)
        text_width = language_model.get_input_embeddings().embedding_dim
        text_config = getattr(config, "text_config", None)
        # OPT's smallest embed in fewer channels than they compute in.
        expected = getattr(
            text_config, "word_embed_proj_dim", getattr(text_config, "hidden_size", text_width)
        )
        if expected != text_width:
            raise ValueError(
                f"language_model: expected embeddings of width {expected} (config.text_config), got "
                f"{text_width}"
            )
        super().__init__(Blip2GenerationConfig.from_any(config), text_width, vision_model, use_fused)
        self.language_model = language_model.requires_grad_(False)
        self.position_limit = position_limit(language_model)
        self.train(self.training)

    @classmethod
    def from_blip2_config(
        cls,
        config: Any,
        *,
        language_model: nn.Module | None = None,
        vision_model: nn.Module | None = None,
        use_fused: bool = False,
    ) -> "Blip2ForConditionalGeneration":
        """Build from a transformers `Blip2Config` or `InstructBlipConfig`, the parts it describes included.

        Args:
            config: the configuration.
            language_model, vision_model: used instead of new ones with random weights.
            use_fused: as for the class.

        Raises:
            TypeError, ValueError: another configuration, or a language model of another width than it says.
        """
        Blip2GenerationConfig.from_any(config)
        if not hasattr(config, "text_config"):
            raise TypeError(f"config: expected a Blip2Config or InstructBlipConfig, got {describe(config)}")
        if language_model is None:
            auto = AutoModelForSeq2SeqLM if config.text_config.is_encoder_decoder else AutoModelForCausalLM
            language_model = auto.from_config(config.text_config)
        if vision_model is None:
            instruct = config.qformer_config.model_type != "blip_2_qformer"
            vision_class = InstructBlipVisionModel if instruct else Blip2VisionModel
            vision_model = vision_class(config.vision_config)
        return cls(config, language_model=language_model, vision_model=vision_model, use_fused=use_fused)

    @classmethod
    def from_transformers(
        cls, model: nn.Module, *, use_fused: bool = False
    ) -> "Blip2ForConditionalGeneration":
        """Take over a transformers `Blip2ForConditionalGeneration` or `InstructBlipForConditionalGeneration`.

        Language model and image encoder are shared with it (and frozen), so they take no memory twice; the
        trainable parts are copied.

        Raises:
            TypeError: a model without these parts.
            ValueError: weights that do not fit, all named.
        """
        for name in (
            "config",
            "vision_model",
            "qformer",
            "query_tokens",
            "language_projection",
            "language_model",
        ):
            if not hasattr(model, name):
                raise TypeError(
                    f"model: expected a BLIP-2 or InstructBLIP model with {name}, got {describe(model)}"
                )
        ours = cls(
            model.config,
            language_model=model.language_model,
            vision_model=FrozenVisionEncoder(model.vision_model),
            use_fused=use_fused,
        )
        copy_weights(ours.qformer, model.qformer)
        copy_weights(ours.language_projection, model.language_projection)
        copy_weights(ours.ln_vision, model.vision_model.post_layernorm)
        ours.query_tokens = nn.Parameter(model.query_tokens.detach().clone())
        return ours.train(model.training)

    @classmethod
    def from_pretraining(
        cls, stage1: Blip2Base, language_model: nn.Module, *, use_fused: bool | None = None
    ) -> "Blip2ForConditionalGeneration":
        """Start stage 2 from a stage-1 model: its Q-Former, queries and ln_vision (copied) and image encoder
        (shared).

        Args:
            stage1: a `Blip2ForPreTraining` or another model of its kind. Its text parts are left behind.
            language_model: as for the class. `language_projection` is new.
            use_fused: default as stage1.

        Raises:
            TypeError: not a stage-1 model, or no language model.
        """
        if not isinstance(stage1, Blip2Base):
            raise TypeError(f"stage1: expected a Blip2ForPreTraining, got {describe(stage1)}")
        qformer = copy.deepcopy(stage1.config.qformer)
        qformer.use_qformer_text_input = False
        config = Blip2GenerationConfig(qformer, stage1.config.num_query_tokens, stage1.ln_vision.eps)
        ours = cls(
            config,
            language_model=language_model,
            vision_model=stage1.vision_model,
            use_fused=stage1.use_fused if use_fused is None else use_fused,
        )
        copy_weights(ours.qformer, stage1.qformer)
        copy_weights(ours.ln_vision, stage1.ln_vision)
        ours.query_tokens = nn.Parameter(stage1.query_tokens.detach().clone())
        ours.language_projection.to(stage1.query_tokens.device, stage1.query_tokens.dtype)
        return ours.train(stage1.training)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model is an encoder-decoder."""
        return bool(self.language_model.config.is_encoder_decoder)

    @property
    def heads_supervised_rows(self) -> bool:
        """Whether the language model's head is to see supervised rows only."""
        return self.use_fused and self.qformer.fused_encoder.uses(Saving.SUPERVISED_ROWS)

    def train(self, mode: bool = True) -> "Blip2ForConditionalGeneration":
        """As `nn.Module.train`, but language model and image encoder stay in eval mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Blip2GenerationOutput:
        """Loss and logits of texts behind the soft prompts of their images.

        The text is given in one of two ways. With `prompt_lengths`, `input_ids` is prompt and answer in one:
        the first `prompt_lengths[i]` real tokens of a row are not supervised, the others are; an
        encoder-decoder gets the former in its encoder and the latter as its decoder's labels (prefix-LM).
        With `labels`, a decoder-only model takes one label a token (unshifted, -100 for none, as in
        transformers); an encoder-decoder takes `input_ids` (or nothing) in its encoder and `labels` in its
        decoder. Soft prompt and padding are never supervised. Special tokens are the tokenizer's business:
        nothing is added here. Any padding side will do, and does not change a number.

        Args:
            input_ids: integers [B, T].
            attention_mask: 0/1 [B, T]; default all 1.
            labels: integers [B, T] (decoder-only) or [B, T_out] (encoder-decoder), -100 for none.
            pixel_values, image_features, image_mask, qformer_input_ids, qformer_attention_mask: as for
                `soft_prompt`.
            prompt_lengths: integers [B], in [0, real tokens of the row].
            decoder_input_ids, decoder_attention_mask: encoder-decoder only, [B, T_out]; by default made from
                the labels.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value; nothing to supervise; a text
            longer than the language model's position table.
        """
        soft_prompt = self.soft_prompt(
            pixel_values,
            image_features,
            image_mask=image_mask,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
        )
        batch = soft_prompt.shape[0]
        if labels is not None and prompt_lengths is not None:
            raise ValueError("prompt_lengths: expected labels or prompt_lengths, got both")
        if input_ids is None:
            if attention_mask is not None or prompt_lengths is not None or not self.is_encoder_decoder:
                raise ValueError("input_ids: expected integers [batch, tokens], got None")
            input_ids = torch.zeros(batch, 0, dtype=torch.int64, device=soft_prompt.device)
        attention_mask = check_text("", input_ids, attention_mask, batch)
        if self.is_encoder_decoder:
            return self._forward_encoder_decoder(
                soft_prompt,
                input_ids,
                attention_mask,
                labels,
                prompt_lengths,
                decoder_input_ids,
                decoder_attention_mask,
            )
        for name, value in (
            ("decoder_input_ids", decoder_input_ids),
            ("decoder_attention_mask", decoder_attention_mask),
        ):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None, since the language model is decoder-only, got {describe(value)}"
                )
        return self._forward_decoder_only(soft_prompt, input_ids, attention_mask, labels, prompt_lengths)

    def _forward_decoder_only(
        self,
        soft_prompt: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        prompt_lengths: Tensor | None,
    ) -> Blip2GenerationOutput:
        if input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: expected at least one token behind the soft prompt, got {describe(input_ids)}"
            )
        if labels is not None:
            self._check_labels(labels, list(input_ids.shape))
            labels = labels.masked_fill(attention_mask == 0, -100)
        elif prompt_lengths is not None:
            labels = labels_behind_prompt(input_ids, attention_mask, prompt_lengths)
        # Padding goes behind the text, so that positions and rows are those of the text alone.
        order = front_order(attention_mask)
        text_ids, text_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        inputs = self._inputs(soft_prompt, text_ids, text_mask)
        if labels is None:
            logits = self.language_model(**inputs, use_cache=False).logits
            return Blip2GenerationOutput(None, texts_as_given(logits, order), soft_prompt)
        text_labels = labels.gather(1, order)
        labels = torch.cat([text_labels.new_full(soft_prompt.shape[:2], -100), text_labels], dim=1).long()
        rows = (labels.flatten() != -100).nonzero()[:, 0]
        self._check_supervised(rows, labels)
        if not self.heads_supervised_rows:
            output = self.language_model(**inputs, labels=labels, use_cache=False)
            return Blip2GenerationOutput(output.loss, texts_as_given(output.logits, order), soft_prompt)
        # A label is predicted by the row before it; there always is one, the soft prompt's last.
        loss = supervised_row_loss(
            lambda: self.language_model(**inputs, use_cache=False),
            self.language_model.get_output_embeddings(),
            rows - 1,
            labels.flatten()[rows],
        )
        return Blip2GenerationOutput(loss, None, soft_prompt)

    def _forward_encoder_decoder(
        self,
        soft_prompt: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        prompt_lengths: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
    ) -> Blip2GenerationOutput:
        if prompt_lengths is not None:
            input_ids, attention_mask, labels = split_prefix(input_ids, attention_mask, prompt_lengths)
            self._check_decoder_length("prompt_lengths", labels)
        order = front_order(attention_mask)
        inputs = self._inputs(soft_prompt, input_ids.gather(1, order), attention_mask.gather(1, order))
        batch = soft_prompt.shape[0]
        if labels is not None:
            self._check_labels(labels, [batch, "tokens"])
            self._check_decoder_length("labels", labels)
        length = "tokens" if labels is None else labels.shape[1]
        if decoder_input_ids is not None:
            check_tensor("decoder_input_ids", decoder_input_ids, [batch, length], TOKEN_IDS)
            self._check_decoder_length("decoder_input_ids", decoder_input_ids)
            check_range("decoder_input_ids", decoder_input_ids, self._vocabulary)
            inputs["decoder_input_ids"] = decoder_input_ids
            length = decoder_input_ids.shape[1]
        if decoder_attention_mask is not None:
            check_tensor("decoder_attention_mask", decoder_attention_mask, [batch, length], MASK_DTYPES)
            check_binary("decoder_attention_mask", decoder_attention_mask)
            inputs["decoder_attention_mask"] = decoder_attention_mask
        if labels is None:
            if decoder_input_ids is None:
                raise ValueError(
                    "labels: expected labels, prompt_lengths or decoder_input_ids, since the language model "
                    "is an encoder-decoder, got none of them"
                )
            logits = self.language_model(**inputs, use_cache=False).logits
            return Blip2GenerationOutput(None, logits, soft_prompt)
        labels = labels.long().contiguous()
        rows = (labels.flatten() != -100).nonzero()[:, 0]
        self._check_supervised(rows, labels)
        shift = getattr(self.language_model, "prepare_decoder_input_ids_from_labels", None)
        if not self.heads_supervised_rows or (shift is None and decoder_input_ids is None):
            output = self.language_model(**inputs, labels=labels, use_cache=False)
            return Blip2GenerationOutput(output.loss, output.logits, soft_prompt)
        if decoder_input_ids is None:
            inputs["decoder_input_ids"] = shift(labels=labels)
        loss = supervised_row_loss(
            lambda: self.language_model(**inputs, use_cache=False),
            self.language_model.get_output_embeddings(),
            rows,
            labels.flatten()[rows],
        )
        return Blip2GenerationOutput(loss, None, soft_prompt)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **generate_options: Any,
    ) -> Any:
        """Let the language model continue soft prompt and prompt.

        Args:
            pixel_values, image_features, image_mask, qformer_input_ids, qformer_attention_mask: as for
                `soft_prompt`.
            input_ids: integers [B, T], the prompts; [B, 0] for none. By default the beginning-of-sequence
                token where a decoder-only model has one, else none.
            attention_mask: 0/1 [B, T], padding on any side; default all 1.
            generate_options: handed to the language model's own `generate`, which refuses those it does not
                know: `max_new_tokens`, `num_beams`, `do_sample`, `generation_config`, `streamer`, ... Without
                a bound of the caller's or the model's own, at most 20 tokens, as transformers has it. Inputs
                of the language model (`inputs_embeds`, `past_key_values`, ...) are made here, and refused.

        Returns:
            What the language model's `generate` returns. Sequences hold new tokens only, since prompts go in
            as embeddings; those of an encoder-decoder begin with its decoder start token.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value; soft prompt, prompt and new
            tokens together longer than the language model's position table.
        """
        check_generate_options(generate_options, getattr(self.language_model, "generation_config", None))
        soft_prompt = self.soft_prompt(
            pixel_values,
            image_features,
            image_mask=image_mask,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
        )
        batch = soft_prompt.shape[0]
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("attention_mask: expected input_ids beside it, got None")
            start = [] if self.is_encoder_decoder else self._start_tokens()
            input_ids = torch.tensor([start] * batch, dtype=torch.int64, device=soft_prompt.device)
        attention_mask = check_text("", input_ids, attention_mask, batch)
        order = front_order(attention_mask)
        inputs = self._inputs(soft_prompt, input_ids.gather(1, order), attention_mask.gather(1, order))
        if not self.is_encoder_decoder:
            inputs = move_padding_to_front(inputs)
        length = 1 if self.is_encoder_decoder else inputs["inputs_embeds"].shape[1]
        options = limit_new_tokens(self.language_model, generate_options, length, self.position_limit)
        return self.language_model.generate(**inputs, **options)

    def _inputs(self, soft_prompt: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Embeddings [B, Q + T, D] and mask [B, Q + T] for the language model: soft prompt, then text."""
        length = soft_prompt.shape[1] + input_ids.shape[1]
        if self.position_limit is not None and length > self.position_limit:
            raise ValueError(
                f"input_ids: expected at most {self.position_limit - soft_prompt.shape[1]} tokens behind a "
                f"soft prompt of {soft_prompt.shape[1]} (the language model's position table holds "
                f"{self.position_limit}), got {input_ids.shape[1]}"
            )
        embedding = self.language_model.get_input_embeddings()
        check_range("input_ids", input_ids, self._vocabulary)
        text = embedding(input_ids.to(embedding.weight.device))
        soft_prompt = soft_prompt.to(text.device, text.dtype)
        mask = attention_mask.to(text.device, torch.int64)
        return {
            "inputs_embeds": torch.cat([soft_prompt, text], dim=1),
            "attention_mask": torch.cat([mask.new_ones(soft_prompt.shape[:2]), mask], dim=1),
        }

    def _start_tokens(self) -> list[int]:
        for config in (getattr(self.language_model, "generation_config", None), self.language_model.config):
            token = getattr(config, "bos_token_id", None)
            if token is not None:
                return [token]
        return []

    @property
    def _vocabulary(self) -> int:
        return self.language_model.get_input_embeddings().num_embeddings

    def _check_decoder_length(self, name: str, tokens: Tensor) -> None:
        """Refuse an answer [B, T_out], made from the argument of that name, that the decoder has no positions
        for."""
        if self.position_limit is not None and tokens.shape[1] > self.position_limit:
            raise ValueError(
                f"{name}: expected at most {self.position_limit} tokens for the decoder (its position "
                f"table), got {tokens.shape[1]}"
            )

    def _check_labels(self, labels: Tensor, shape: list[int | str]) -> None:
        check_tensor("labels", labels, shape, TOKEN_IDS)
        check_range("labels", labels, self._vocabulary, ignored=-100)

    @staticmethod
    def _check_supervised(rows: Tensor, labels: Tensor) -> None:
        if rows.numel() == 0:
            raise ValueError(
                f"labels: expected at least one that is not -100, got none among {list(labels.shape)} "
                "(padding and prompt are never supervised)"
            )
