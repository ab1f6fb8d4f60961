"""What the models of both stages read of images: any frozen encoder, the same refusals, older state dicts."""

import copy

import pytest
import torch
from generation_cases import QFORMER, SIDE, VISION, WIDTH, language_model
from pretraining_cases import (
    BOTH_PATHS,
    IMAGE_TOKENS,
    IMAGE_WIDTH,
    small_batch,
    small_config,
)
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.generation import Blip2ForConditionalGeneration, Blip2GenerationConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.vision import FrozenVisionEncoder


class PixelEncoder(nn.Module):
    """Patches of a [B, 3, 4, 5] picture, one a column, through a linear layer and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, IMAGE_WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixel_values):
        return self.dropout(self.linear(pixel_values.flatten(1, 2).transpose(1, 2)))


class TimmEncoder(nn.Module):
    """As timm's: `forward` classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 14, stride=14)

    def forward_features(self, pixel_values):
        return self.patches(pixel_values).flatten(2).transpose(1, 2)

    def forward(self, pixel_values):
        return self.forward_features(pixel_values).mean(dim=1)


ENCODERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "blip2": lambda: Blip2VisionModel(Blip2VisionConfig(**VISION)),
    "timm": TimmEncoder,
}


def stage_1(vision_model, use_fused=False):
    qformer = Blip2QFormerConfig(**QFORMER, use_qformer_text_input=True)
    config = Blip2PreTrainingConfig(
        qformer, num_query_tokens=5, image_text_hidden_size=8, cls_token_id=1, sep_token_id=2
    )
    return Blip2ForPreTraining(config, vision_model=vision_model, use_fused=use_fused).eval()


def stage_2(vision_model, use_fused=False):
    config = Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER), 5)
    parts = {"language_model": language_model("opt"), "vision_model": vision_model}
    return Blip2ForConditionalGeneration(config, **parts, use_fused=use_fused).eval()


STAGES = pytest.mark.parametrize("build", [stage_1, stage_2])


def read(model, **images):
    """What the model makes of images alone."""
    if isinstance(model, Blip2ForPreTraining):
        return model.get_image_features(**images)
    return model.soft_prompt(**images)


@BOTH_PATHS
@STAGES
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_need_not_be_wrapped(name, build, use_fused):
    encoder = ENCODERS[name]().eval()
    wrapped = FrozenVisionEncoder(copy.deepcopy(encoder))
    model = build(encoder, use_fused)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    expected = read(model, image_features=wrapped(pixels))
    assert torch.equal(read(model, pixel_values=pixels), expected)
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    # One that is wrapped stays as it is.
    assert build(model.vision_model).vision_model is model.vision_model


@STAGES
def test_ln_vision_starts_where_the_encoder_brings_one(build):
    encoder = ENCODERS["blip2"]()
    nn.init.normal_(encoder.post_layernorm.weight)
    model = build(encoder)
    assert torch.equal(model.ln_vision.weight, encoder.post_layernorm.weight)
    assert model.ln_vision.weight is not encoder.post_layernorm.weight
    assert model.ln_vision.weight.requires_grad
    other = Blip2VisionModel(Blip2VisionConfig(**{**VISION, "hidden_size": 16}))
    with pytest.raises(ValueError, match=r"^vision_model: expected features of width 24 .*, got 16"):
        build(other)


PIXELS = {
    "integers": (torch.ones(2, 3, SIDE, SIDE, dtype=torch.int64), TypeError, "float.* got int64"),
    "a path": ("cat.png", TypeError, "a tensor .* got str 'cat.png'"),
    "one picture": (torch.zeros(3, SIDE, SIDE), ValueError, r".*height, width\], got float32 \[3, 28, 28\]"),
    "no picture": (torch.zeros(0, 3, SIDE, SIDE), ValueError, "at least one pixel of one picture"),
    "another size": (torch.zeros(2, 3, SIDE, 14), ValueError, "pictures that CLIPVisionModel takes"),
    "elsewhere": (
        torch.zeros(2, 3, SIDE, SIDE, device="meta"),
        ValueError,
        "a tensor on cpu, got one on meta",
    ),
}


@STAGES
@pytest.mark.parametrize("case", PIXELS)
def test_pixels_are_named_as_pixels(build, case):
    pixels, error, message = PIXELS[case]
    with pytest.raises(error, match=f"^pixel_values: expected {message}"):
        read(build(ENCODERS["clip"]()), pixel_values=pixels)


@STAGES
def test_features_of_an_encoder_are_named_as_its(build):
    model = build(nn.Conv2d(3, 9, 14, stride=14))
    message = r"^features of vision_model: expected .*\[batch, tokens, 24\], got float32 \[2, 4, 9\]"
    with pytest.raises(ValueError, match=message):
        read(model, pixel_values=torch.zeros(2, 3, SIDE, SIDE))


@STAGES
@pytest.mark.parametrize("name", ENCODERS)
def test_state_dicts_with_the_encoders_own_names_load(name, build):
    """As they were before stage 1 wrapped encoders, and as transformers has them."""
    model, other = build(ENCODERS[name]()), build(ENCODERS[name]())
    encoder = ENCODERS[name]()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("vision_model.")}
    state |= {f"vision_model.{k}": v for k, v in encoder.state_dict().items()}
    norm = state.pop("ln_vision.weight"), state.pop("ln_vision.bias")
    if name == "blip2":  # whose post_layernorm is ln_vision
        norm = encoder.post_layernorm.weight, encoder.post_layernorm.bias
    else:
        state |= {"ln_vision.weight": norm[0], "ln_vision.bias": norm[1]}
    other.load_state_dict(state, strict=True)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(other.vision_model(pixels), FrozenVisionEncoder(encoder)(pixels))
    assert torch.equal(other.ln_vision.weight, norm[0]) and torch.equal(other.ln_vision.bias, norm[1])
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.vision_model(pixels), model.vision_model(pixels))


@BOTH_PATHS
@pytest.mark.parametrize("pass_images", ["get_image_features", "encode_image", "prepare_images"])
def test_an_image_mask_elsewhere_is_named(pass_images, use_fused):
    model = stage_1(None, use_fused)
    features, mask = torch.randn(2, 4, WIDTH), torch.ones(2, 4, device="meta")
    with pytest.raises(ValueError, match=r"^image_mask: expected a tensor on cpu, got one on meta"):
        getattr(model, pass_images)(features, image_mask=mask)


def test_the_image_encoder_never_trains():
    vision = PixelEncoder()
    model = Blip2ForPreTraining(small_config(), vision_model=vision).train()
    assert model.training and not vision.training and not vision.dropout.training
    inputs = small_batch()
    del inputs["image_features"]
    pixels = torch.randn(4, 3, 4, IMAGE_TOKENS)
    torch.manual_seed(2)
    output = model(**inputs, pixel_values=pixels)
    output.loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in vision.parameters())
    assert model.ln_vision.weight.grad is not None
    torch.manual_seed(2)
    again = model(**inputs, image_features=vision(pixels))
    assert torch.equal(output.loss, again.loss)
