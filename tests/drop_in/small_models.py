"""Small random models of transformers' families with a Q-Former, and what they take."""

from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2QFormerConfig,
    Blip2TextModelWithProjection,
    Blip2VisionConfig,
    Blip2VisionModelWithProjection,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    InstructBlipVideoQFormerConfig,
    InstructBlipVideoVisionConfig,
    InstructBlipVisionConfig,
    OPTConfig,
)

from blip2_kernels import fuse, unfuse

QUERIES, IMAGE = 5, 63
WIDTH = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
TEXT = dict(vocab_size=60, max_position_embeddings=32, initializer_range=0.2, num_hidden_layers=4)


def _configs(vision: Any, qformer: Any, whole: Any, **qformer_options: Any) -> Any:
    parts = dict(
        vision_config=vision(**WIDTH, num_hidden_layers=2, image_size=16, patch_size=4).to_dict(),
        qformer_config=qformer(**WIDTH, **TEXT, encoder_hidden_size=32, **qformer_options).to_dict(),
        text_config=OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=2,
            max_position_embeddings=80, word_embed_proj_dim=32, dropout=0.0,
        ).to_dict(),
    )  # fmt: skip
    return whole(**parts, num_query_tokens=QUERIES)


def blip2_config(**qformer_options: Any) -> Blip2Config:
    config = _configs(Blip2VisionConfig, Blip2QFormerConfig, Blip2Config, **qformer_options)
    config.image_token_index, config.image_text_hidden_size = IMAGE, 16
    return config


def build(cls: type[nn.Module], seed: int = 0, **qformer_options: Any) -> Any:
    """A model of this class in eval mode, with queries that differ."""
    torch.manual_seed(seed)
    if cls in (Blip2ForImageTextRetrieval, Blip2TextModelWithProjection):
        qformer_options["use_qformer_text_input"] = True
    if cls is InstructBlipForConditionalGeneration:
        config = _configs(
            InstructBlipVisionConfig, InstructBlipQFormerConfig, InstructBlipConfig, **qformer_options
        )
        config.image_token_index = IMAGE
    elif cls is InstructBlipVideoForConditionalGeneration:
        config = _configs(
            InstructBlipVideoVisionConfig,
            InstructBlipVideoQFormerConfig,
            InstructBlipVideoConfig,
            **qformer_options,
        )
        config.video_token_index = IMAGE
    else:
        config = blip2_config(**qformer_options)
    model = cls(config).eval()
    if hasattr(model, "query_tokens"):
        nn.init.normal_(model.query_tokens)
    # transformers starts image encoders near 0, where all pictures look alike.
    for parameter in getattr(model, "vision_model", nn.Module()).parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(cls: type[nn.Module], batch: int = 3, seed: int = 1) -> dict[str, Any]:
    """Arguments of a forward pass; texts are padded, behind the image's tokens."""
    generator = torch.Generator().manual_seed(seed)
    frames = 2 if cls is InstructBlipVideoForConditionalGeneration else 1
    pixels = torch.randn(batch, frames, 3, 16, 16, generator=generator)
    pixels = pixels if cls is InstructBlipVideoForConditionalGeneration else pixels[:, 0]
    ids = torch.randint(3, 60, (batch, 7), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, 4:] = 0
        mask[1, 6:] = 0
    images = torch.full((batch, QUERIES * frames), IMAGE)
    both = torch.cat([images, ids], 1), torch.cat([torch.ones_like(images), mask], 1)
    if cls is Blip2VisionModelWithProjection:
        return {"pixel_values": pixels}
    if cls is Blip2TextModelWithProjection:
        return {"input_ids": ids, "attention_mask": mask}
    given = {"pixel_values": pixels, "input_ids": both[0], "attention_mask": both[1]}
    if cls in (InstructBlipForConditionalGeneration, InstructBlipVideoForConditionalGeneration):
        given |= {"qformer_input_ids": ids, "qformer_attention_mask": mask}
    return given


FAMILIES = (
    Blip2Model,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2VisionModelWithProjection,
    Blip2TextModelWithProjection,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
)


def tensors_of(output: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every floating-point tensor of an output, by where it is."""
    if isinstance(output, torch.Tensor):
        return {path: output} if output.is_floating_point() else {}
    items = (
        output.items()
        if hasattr(output, "items")
        else enumerate(output)
        if isinstance(output, tuple | list)
        else ()
    )
    return {name: t for key, value in items for name, t in tensors_of(value, f"{path}.{key}").items()}


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in fp64."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def both(model, *given, **named):
    """What a model says as it was, and fused."""
    plain = unfuse(model)(*given, **named)
    return plain, fuse(model)(*given, **named)


def assert_alike(plain, ours, atol=1e-5):
    plain, ours = tensors_of(plain), tensors_of(ours)
    assert plain.keys() == ours.keys() and plain
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
