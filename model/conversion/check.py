"""Whether a checkpoint means here what it meant where it came from: one forward pass of both."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..config import Blip2PreTrainingConfig
from ..generation import Blip2ForConditionalGeneration
from ..pretraining import Blip2ForPreTraining
from ..vision import FrozenVisionEncoder
from . import lavis_plain
from .configs import config_from_json, model_on_meta
from .convert import Conversion, plan_conversion
from .names import Kind, rename_all

TOLERANCE = {"fp32": 1e-4, "half": 2e-2}
"""Largest difference, as a share of the largest number; "half" where a language model computes in 16 bits."""


@dataclass(frozen=True)
class CheckedOutput:
    """One output of both models: `difference` is the largest there is, as a share of the largest number."""

    name: str
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance


@torch.no_grad()
def check_loading(
    path: Path,
    form: str,
    *,
    source: Path | None = None,
    source_format: str | None = None,
    seed: int = 0,
    **options: Any,
) -> list[CheckedOutput]:
    """Run our model, fused, with the weights of `path`, and the plain path of `source` on the same input.

    The plain path of a source is its own: LAVIS's written out in plain functions, transformers' model, or
    ours with `use_fused=False`. Everything is computed in fp32 but the language model, which stays as stored.

    Args:
        path: the checkpoint to check.
        form: of `path`.
        source: what it was converted from; default `path` itself.
        source_format: of `source`.
        seed: of the pictures and texts.
        options: as for `plan_conversion`, where a checkpoint needs them.

    Raises:
        CheckpointError: a checkpoint that does not fit its model.
    """
    checked = plan_conversion(path, form, "transformers", **options)
    checked.refuse_problems()
    if source is None or source_format is None:
        given = checked
    else:
        given = plan_conversion(source, source_format, "transformers", **options)
        given.refuse_problems()
    kind, fields = checked.plan.kind, checked.target.config or {}
    config = config_from_json(kind, fields)
    inputs = _inputs(kind, config, seed)
    ours = _ours(kind, config, checked.canonical, inputs, use_fused=True)
    config = config_from_json(kind, given.target.config or {})
    if given.source_format == "lavis":
        plain = _lavis(kind, config, given, inputs)
    elif given.source_format == "transformers":
        plain = _transformers(kind, config, given.canonical, inputs)
    else:
        plain = _ours(kind, config, given.canonical, inputs, use_fused=False)
    half = any(
        value.dtype in (torch.float16, torch.bfloat16)
        for name, value in checked.canonical.items()
        if name.startswith("language_model.")
    )
    results = []
    for name, truth in plain.items():
        difference = float((ours[name].float() - truth.float()).abs().max() / truth.float().abs().max())
        tolerance = TOLERANCE["half" if half and name == "logits" else "fp32"]
        results.append(CheckedOutput(name, difference, tolerance))
    return results


@dataclass(frozen=True)
class _Inputs:
    pixels: Tensor
    ids: Tensor
    mask: Tensor
    words: Tensor
    """Of the language model."""


def _inputs(kind: Kind, config: Any, seed: int) -> _Inputs:
    generator = torch.Generator().manual_seed(seed)
    size, tokens = config.vision_config.image_size, 6
    pixels = torch.randn(2, 3, size, size, generator=generator)
    ids = torch.randint(1, config.qformer_config.vocab_size, (2, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    words = torch.randint(1, config.text_config.vocab_size, (2, tokens), generator=generator)
    return _Inputs(pixels, ids, mask, words)


# --- ours ---


def _ours(
    kind: Kind, config: Any, state: Mapping[str, Tensor], inputs: _Inputs, use_fused: bool
) -> dict[str, Tensor]:
    vision_class = type(model_on_meta(kind, config).vision_model)
    vision = FrozenVisionEncoder(_load(vision_class, config.vision_config, state, "vision_model."))
    trained = rename_all(state, kind, "transformers", "blip2_kernels")
    own = {
        name: value.float()
        for name, value in (trained.placed | trained.carried).items()
        if not name.startswith(("vision_model.", "language_model.", "Qformer."))
    }
    model: Any
    if kind.language is None:
        # Which tokens begin and end a text is the tokenizer's business: no output here depends on it.
        fields = {"cls_token_id": 1, "sep_token_id": 2, "max_text_length": inputs.ids.shape[1]}
        model = Blip2ForPreTraining(
            Blip2PreTrainingConfig.from_blip2_config(config, **fields),
            vision_model=vision,
            use_fused=use_fused,
        )
    else:
        model = Blip2ForConditionalGeneration(
            config,
            language_model=_load_language_model(kind, config, state),
            vision_model=vision,
            use_fused=use_fused,
        )
    _fill(model.eval(), own)
    if kind.language is None:
        texts = (inputs.ids, inputs.mask)
        outputs = {
            "image features": vision(inputs.pixels),
            "queries": model.encode_image(pixel_values=inputs.pixels),
            "image_embeds": model.get_image_features(pixel_values=inputs.pixels),
            "text_embeds": model.get_text_features(*texts),
            "itm logits": model.match(model.get_multimodal_features(*texts, pixel_values=inputs.pixels)),
        }
        if "cls.predictions.bias" in own:
            words = model.embeddings.word_embeddings.weight
            outputs["vocabulary logits"] = model.cls["predictions"](model.text_hidden(*texts), words)
        return outputs
    text = {"qformer_input_ids": inputs.ids, "qformer_attention_mask": inputs.mask} if kind.instruct else {}
    prompt = model.soft_prompt(inputs.pixels, **text)
    return {
        "image features": vision(inputs.pixels),
        "soft prompt": prompt,
        "logits": _language_logits(model.language_model, prompt, inputs.words),
    }


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Every parameter that the checkpoint has; one of transformers has no head for stage 1."""
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.copy_(state[name])


# --- transformers ---


def _transformers(kind: Kind, config: Any, state: Mapping[str, Tensor], inputs: _Inputs) -> dict[str, Tensor]:
    shell = model_on_meta(kind, config)
    vision = _load(type(shell.vision_model), config.vision_config, state, "vision_model.")
    qformer = _load(type(shell.qformer), config.qformer_config, state, "qformer.")
    before: list[Tensor] = []
    vision.post_layernorm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    # Called a second time for its pooled output, which nobody reads: the first call is that of all tokens.
    features = vision(inputs.pixels).last_hidden_state
    queries = state["query_tokens"].float().expand(2, -1, -1)
    read = {"encoder_hidden_states": features}
    if kind.language is not None:
        text: dict[str, Any] = {}
        if kind.instruct:
            ones = torch.ones(queries.shape[:2], dtype=torch.long)
            text = {"input_ids": inputs.ids, "attention_mask": torch.cat([ones, inputs.mask], dim=1)}
        hidden = qformer(query_embeds=queries, **read, **text).last_hidden_state
        prompt = _linear(state, "language_projection", hidden[:, : queries.shape[1]])
        model = _load_language_model(kind, config, state)
        logits = _language_logits(model, prompt, inputs.words)
        return {"image features": before[0], "soft prompt": prompt, "logits": logits}
    words = F.embedding(inputs.ids, state["embeddings.word_embeddings.weight"].float())
    words = words + state["embeddings.position_embeddings.weight"][: inputs.ids.shape[1]].float()
    image = qformer(query_embeds=queries, **read).last_hidden_state
    text_hidden = qformer(query_embeds=words, query_length=0, attention_mask=inputs.mask)[0]
    both_mask = F.pad(inputs.mask, (queries.shape[1], 0), value=1)
    both = qformer(
        query_embeds=torch.cat([queries, words], dim=1),
        query_length=queries.shape[1],
        attention_mask=both_mask,
        **read,
    ).last_hidden_state
    return {
        "image features": before[0],
        "queries": image,
        "image_embeds": F.normalize(_linear(state, "vision_projection", image), dim=-1),
        "text_embeds": F.normalize(_linear(state, "text_projection", text_hidden[:, 0]), dim=-1),
        "itm logits": _linear(state, "itm_head", both[:, : queries.shape[1]]).mean(dim=1),
    }


# --- LAVIS ---


def _lavis(kind: Kind, config: Any, given: Conversion, inputs: _Inputs) -> dict[str, Tensor]:
    state = given.source
    heads = config.qformer_config.num_attention_heads
    vision = config.vision_config
    features = lavis_plain.image_features(
        state, inputs.pixels, vision.num_hidden_layers, vision.num_attention_heads
    )
    outputs = {"image features": features}
    count = state["query_tokens"].shape[1]
    if kind.language is not None:
        text = (inputs.ids, inputs.mask) if kind.instruct else (None, None)
        hidden = lavis_plain.qformer(state, heads, features, *text)[:, :count]
        prompt = _linear(state, f"{kind.language}_proj", hidden)
        model = _load_language_model(kind, config, given.canonical)
        return outputs | {"soft prompt": prompt, "logits": _language_logits(model, prompt, inputs.words)}
    image = lavis_plain.qformer(state, heads, features)
    text_hidden = lavis_plain.qformer(state, heads, None, inputs.ids, inputs.mask)[:, 0]
    both = lavis_plain.qformer(state, heads, features, inputs.ids, inputs.mask)
    outputs |= {
        "queries": image,
        "image_embeds": F.normalize(_linear(state, "vision_proj", image), dim=-1),
        "text_embeds": F.normalize(_linear(state, "text_proj", text_hidden), dim=-1),
        "itm logits": _linear(state, "itm_head", both[:, :count]).mean(dim=1),
    }
    if "Qformer.cls.predictions.bias" in state:
        outputs["vocabulary logits"] = lavis_plain.vocabulary_logits(state, text_hidden)
    return outputs


# --- what they share ---


def _linear(state: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    return F.linear(hidden, state[f"{name}.weight"].float(), state[f"{name}.bias"].float())


def _language_logits(model: Any, prompt: Tensor, words: Tensor) -> Tensor:
    """What a language model makes of a soft prompt and some words, which an encoder-decoder decodes too."""
    embedded = model.get_input_embeddings()(words)
    inputs = torch.cat([prompt.to(embedded.dtype), embedded], dim=1)
    decoder = {"decoder_input_ids": words} if model.config.is_encoder_decoder else {}
    return model(inputs_embeds=inputs, **decoder).logits


def _load(
    cls: type[PreTrainedModel],
    config: Any,
    state: Mapping[str, Tensor],
    front: str,
    dtype: Any = torch.float32,
) -> Any:
    """A part of the model, in eval mode, with the tensors whose names begin with `front`."""
    part = {name.removeprefix(front): value for name, value in state.items() if name.startswith(front)}
    with _quiet():
        return cls.from_pretrained(None, config=config, state_dict=part, dtype=dtype).eval()


def _load_language_model(kind: Kind, config: Any, state: Mapping[str, Tensor]) -> Any:
    front = "language_model."
    dtype = next(value.dtype for name, value in state.items() if name.startswith(front))
    return _load(
        type(model_on_meta(kind, config).language_model), config.text_config, state, front, dtype
    ).requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers shows a bar for every model it fills."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
