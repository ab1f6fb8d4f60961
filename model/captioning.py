"""Captions from a stage-1 model: image-grounded generation (paper section 3.1, ITG) through transformers'
`generate`.

The text starts with [DEC], reads the queries and itself under the multimodal causal mask, and ends at [SEP].
Greedy search, beams, sampling and every logits processor are transformers' own; here is only the small
adapter that shows it the stage-1 model as a decoder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from blip2_kernels.checks import check_binary, check_int, check_range, check_tensor, describe
from blip2_kernels.layout import MASK_DTYPES
from blip2_kernels.mask import MaskMode

from .base import Blip2Base, evaluation_mode
from .generate_options import check_generate_options, limit_new_tokens, option_in_effect
from .qformer import QFormerCache
from .qformer_text import TOKEN_IDS


class CaptionConfig(PreTrainedConfig):
    """The little that `generate` asks a configuration about."""

    model_type = "blip2_kernels_caption"


class CaptionDecoder(PreTrainedModel, GenerationMixin):
    """A stage-1 model in the form that transformers' `generate` drives.

    Call `generate(input_ids, attention_mask=..., ...)` with either `past_key_values`, a `QFormerCache` that
    holds the queries (`cached_queries`), or `visual_features` [B, N, width] behind `ln_vision`, which are
    then read again with the whole text at every step.

    Args:
        model: a stage-1 model with its language-modelling head, `Blip2ForPreTraining`.
    """

    config_class = CaptionConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, model: Blip2Base) -> None:
        qformer = model.config.qformer
        super().__init__(
            CaptionConfig(
                vocab_size=qformer.vocab_size,
                hidden_size=qformer.hidden_size,
                num_hidden_layers=qformer.num_hidden_layers,
                num_attention_heads=qformer.num_attention_heads,
            )
        )
        self.stage1 = model
        self.generation_config = GenerationConfig(
            bos_token_id=model.config.dec_token_id,
            eos_token_id=model.config.sep_token_id,
            pad_token_id=model.config.pad_token_id,
        )

    def cached_queries(self, features: Tensor, mask: Tensor | None = None, copies: int = 1) -> QFormerCache:
        """Read images once and keep the queries' keys and values.

        Args:
            features: [B, N, width], behind `ln_vision`.
            mask: 0/1 [B, N], or None.
            copies: rows of generation an image (beams, or sequences to return).

        Returns:
            A cache of B * copies rows.
        """
        queries = self.stage1.query_tokens.expand(features.shape[0], -1, -1)
        cache = self.stage1.qformer(
            queries, encoder_hidden_states=features, encoder_attention_mask=mask, use_cache=True
        ).past_key_values
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return cache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: QFormerCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        visual_features: Tensor | None = None,
        visual_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> dict[str, Any]:
        """What `forward` gets at a step.

        transformers counts the rows of a cache as text tokens, ours starts with queries: so how much of the
        text is new is worked out here, and whatever transformers has worked out (`next_sequence_length`,
        positions) is not used.
        """
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "visual_features": visual_features,
            "visual_mask": visual_mask,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: QFormerCache | None = None,
        visual_features: Tensor | None = None,
        visual_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Logits [B, 1, vocab] of the token that follows `input_ids` [B, T].

        Args:
            input_ids: the whole text so far; with a cache only the tokens it does not hold are run.
            attention_mask: 0/1 [B, T]; positions count real tokens.
            past_key_values: cache with the queries and any part of the text, extended in place; or
            visual_features: [B, N, width], behind `ln_vision`.
            visual_mask: 0/1 [B, N].
            return_dict: as transformers calls it; the result is always an object.
        """
        model, num_queries = self.stage1, self.stage1.config.num_query_tokens
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        done = past_key_values.get_seq_length() - num_queries if past_key_values is not None else 0
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        text = model.embeddings(input_ids[:, done:], positions[:, done:])
        mask = F.pad(attention_mask, (num_queries, 0), value=1)
        if past_key_values is not None:
            hidden = model.qformer(
                text, mask, query_length=0, mask=MaskMode.MULTIMODAL_CAUSAL, past_key_values=past_key_values
            ).last_hidden_state
        else:
            queries = model.query_tokens.expand(text.shape[0], -1, -1)
            hidden = model.qformer(
                torch.cat([queries.to(text.dtype), text], dim=1),
                mask,
                visual_features,
                visual_mask,
                query_length=num_queries,
                mask=MaskMode.MULTIMODAL_CAUSAL,
            ).last_hidden_state
        logits = model.cls["predictions"](hidden[:, -1:], model.embeddings.word_embeddings.weight)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


@torch.no_grad()
def generate_captions(
    model: Blip2Base,
    image_features: Tensor | None = None,
    pixel_values: Tensor | None = None,
    *,
    image_mask: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    num_beams: int | None = None,
    num_return_sequences: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    length_penalty: float | None = None,
    use_cache: bool | None = None,
    seed: int | None = None,
    **options: Any,
) -> Any:
    """Caption images with a stage-1 model.

    Runs in eval mode and without gradients, whatever mode the model is in. With `use_cache` each image is
    read once and each token is run once, through the plain layers also where `use_fused` is set; without,
    every step runs image and whole text again, through the fused encoder where that is set. Results are the
    same.

    An option of `generate` that is None is what the `generation_config` among `options` says, and where that
    says nothing either, the default named here.

    Args:
        model: `Blip2ForPreTraining`.
        image_features: [B, N, width], the frozen encoder's output before `ln_vision`; or
        pixel_values: floating [B, channels, height, width], what the image encoder takes.
        image_mask: 0/1 [B, N], image tokens that may be read; default all.
        prompt_ids: integers [B or 1, P], words that the captions go on from (without [CLS] and [SEP]);
            default none.
        prompt_mask: 0/1 as `prompt_ids`, padding on any side; default all real.
        max_new_tokens: longest caption in tokens, [SEP] included; default `config.max_text_length` - 1, or
            what `max_length` says, in which [DEC] and prompt count too.
        min_new_tokens: shortest; default none.
        num_beams: width of beam search; default 1 for none.
        num_return_sequences: captions an image, at most `num_beams` unless sampling; default 1.
        do_sample: sample instead of taking the best token; default False.
        temperature, top_k, top_p: of sampling, refused without it; defaults as transformers'.
        repetition_penalty, length_penalty: defaults as transformers'.
        use_cache: keep keys and values of the queries and the text so far; default True.
        seed: of sampling, without touching torch's own generators; default draws from those.
        options: any other option of transformers' `generate`, such as `generation_config` or `max_length`;
            unknown ones are refused there, and those that hand it images or text here.

    Returns:
        int64 [B * num_return_sequences, at most max_new_tokens]: the captions without [DEC] and prompt, ended
        by [SEP] and padded with `pad_token_id`. With `return_dict_in_generate=True` transformers' output
        object, whose `sequences` are whole.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value; a model without a
            language-modelling head; a caption that may outgrow the position table.
    """
    if not isinstance(model, Blip2Base) or not hasattr(model, "cls"):
        raise TypeError(f"model: expected a Blip2ForPreTraining, got {describe(model)}")
    if seed is not None:
        check_int("seed", seed, 0)
    named = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "length_penalty": length_penalty,
        "use_cache": use_cache,
    }
    options |= {name: value for name, value in named.items() if value is not None}
    decoder = CaptionDecoder(model)
    if option_in_effect("max_length", options) is None:
        decoder.generation_config.max_new_tokens = model.config.max_text_length - 1
    check_generate_options(options, decoder.generation_config)
    features = model.frozen_features(image_features, pixel_values)
    if image_mask is not None:
        check_tensor("image_mask", image_mask, features.shape[:2], MASK_DTYPES, features.device)
        check_binary("image_mask", image_mask)
    input_ids, attention_mask = _start(model, features, prompt_ids, prompt_mask)
    length = input_ids.shape[1]
    options = limit_new_tokens(decoder, options, length, model.config.qformer.max_position_embeddings)
    num_beams = option_in_effect("num_beams", options) or 1
    if num_beams == 1:
        options.pop("length_penalty", None)  # of beams only

    with evaluation_mode(model), _seeded(seed, features.device):
        features = model.ln_vision(features.to(model.ln_vision.weight.dtype))
        if option_in_effect("use_cache", options) is not False:
            copies = max(num_beams, option_in_effect("num_return_sequences", options) or 1)
            options["past_key_values"] = decoder.cached_queries(features, image_mask, copies)
        else:
            options |= {"visual_features": features, "visual_mask": image_mask}
        generated = decoder.generate(input_ids, attention_mask=attention_mask, **options)
    return generated[:, length:] if isinstance(generated, Tensor) else generated


def _start(
    model: Blip2Base, features: Tensor, prompt_ids: Tensor | None, prompt_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[DEC] and the prompt, moved to the right edge: ids and mask, int64 [B, 1 + P]."""
    batch, device = features.shape[0], features.device
    start = torch.full((batch, 1), model.config.dec_token_id, dtype=torch.int64, device=device)
    if prompt_ids is None:
        if prompt_mask is not None:
            raise ValueError("prompt_mask: expected prompt_ids beside it, got None")
        return start, torch.ones_like(start)
    check_tensor("prompt_ids", prompt_ids, ["batch", "tokens"], TOKEN_IDS, device)
    if prompt_ids.shape[0] not in (1, batch):
        raise ValueError(f"prompt_ids: expected [{batch} or 1, tokens], got {list(prompt_ids.shape)}")
    check_range("prompt_ids", prompt_ids, model.config.qformer.vocab_size)
    if prompt_mask is None:
        prompt_mask = torch.ones_like(prompt_ids)
    check_tensor("prompt_mask", prompt_mask, prompt_ids.shape, MASK_DTYPES, device)
    check_binary("prompt_mask", prompt_mask)
    ids = torch.cat([start, prompt_ids.expand(batch, -1).long()], dim=1)
    mask = torch.cat([torch.ones_like(start), prompt_mask.expand(batch, -1).long()], dim=1)
    # A stable sort of 0 before 1: padding to the left, the order of real tokens kept.
    order = torch.argsort(mask, dim=1, stable=True)
    mask = mask.gather(1, order)
    return ids.gather(1, order).masked_fill(mask == 0, model.config.pad_token_id), mask


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Torch's generators at `seed` inside and as they were afterwards; untouched where it is None."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
