"""Every class that embeds a Q-Former: losses, tokens, gradients and precision, fused and as it was."""

import copy

import pytest
import torch
from small_models import (
    FAMILIES,
    IMAGE,
    QUERIES,
    assert_alike,
    both,
    build,
    doubled,
    inputs,
)
from tolerances import assert_same_gradients, assert_yardstick
from torch import nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2TextModelWithProjection,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVideoForConditionalGeneration,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from blip2_kernels import fuse, unfuse

NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GENERATING = (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
)


def first_output(output):
    """What a loss would be made of."""
    for name in ("loss", "logits", "logits_per_image", "image_embeds", "text_embeds"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(f"no output in {list(output)}")


@pytest.mark.parametrize("cls", GENERATING, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_losses(cls, calls):
    model, given = build(cls), inputs(cls)
    given["labels"] = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)
    plain, ours = both(model, **given)
    assert plain.loss.isfinite() and calls
    torch.testing.assert_close(ours.loss, plain.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("cls", GENERATING, ids=lambda cls: cls.__name__)
def test_generated_tokens(cls, how, calls):
    model, given = build(cls), inputs(cls)
    plain = unfuse(model).generate(**given, max_new_tokens=8, **how)
    assert torch.equal(fuse(model).generate(**given, max_new_tokens=8, **how), plain)
    assert calls


@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.__name__)
def test_gradients_of_a_training_step(cls, calls):
    model, given = build(cls, **NO_DROPOUT).double(), doubled(inputs(cls))
    found = []
    for change in (unfuse, fuse):
        change(model).train().zero_grad()
        value = first_output(model(**given))
        # Embeddings have length 1: a sum of squares would have no slope.
        (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, ours = found
    # Parameters without work have zeros where transformers leaves None.
    assert not any(grad.any() for name, grad in ours.items() if name not in plain)
    assert_same_gradients({name: ours[name] for name in plain}, plain, torch.float64)
    assert any(name.startswith("qformer.") for name in plain) and calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", FAMILIES, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_half_precision_of_the_qformer(cls, dtype, calls):
    """The Q-Former of each class on the same input: within twice the plain path's own error."""
    model = build(cls).qformer
    given = {"query_embeds": torch.randn(3, QUERIES, 32), "encoder_hidden_states": torch.randn(3, 17, 32)}
    if cls is Blip2TextModelWithProjection:
        given = {"query_embeds": torch.randn(3, 6, 32), "query_length": 0}
    elif cls is Blip2ForImageTextRetrieval:
        given |= {"query_embeds": torch.randn(3, QUERIES + 6, 32), "query_length": QUERIES}
    elif hasattr(model, "embeddings"):
        mask = torch.ones(3, QUERIES + 6, dtype=torch.long)
        mask[0, -2:] = 0
        given |= {"input_ids": torch.randint(3, 60, (3, 6)), "attention_mask": mask}
    given = {n: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for n, v in given.items()}
    half = model.to(dtype)
    truth = unfuse(copy.deepcopy(half)).double()(**doubled(given)).last_hidden_state
    plain, ours = both(half, **given)
    assert_yardstick(cls.__name__, ours.last_hidden_state, plain.last_hidden_state, truth)
    assert len(calls) == 1


@pytest.mark.parametrize("reads_text", [False, True], ids=["BLIP-2", "InstructBLIP"])
@torch.no_grad()
def test_full_size_shapes(reads_text, calls):
    """BERT-base, 32 queries, EVA-CLIP's width; two layers and few image tokens, which any depth repeats."""
    if reads_text:
        model = InstructBlipQFormerModel(InstructBlipQFormerConfig(num_hidden_layers=2)).eval()
    else:
        model = Blip2QFormerModel(Blip2QFormerConfig(num_hidden_layers=2)).eval()
    given = {"query_embeds": torch.randn(1, 32, 768), "encoder_hidden_states": torch.randn(1, 33, 1408)}
    if reads_text:
        mask = torch.ones(1, 37, dtype=torch.long)
        given |= {"input_ids": torch.randint(3, 30000, (1, 5)), "attention_mask": mask}
    assert_alike(*both(model, **given))
    assert len(calls) == 1


# --- projectors that run a Q-Former on many small windows ---


def granite_speech():
    from transformers import GraniteSpeechConfig
    from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

    config = GraniteSpeechConfig(
        text_config={"model_type": "granite", "hidden_size": 24},
        projector_config={
            "model_type": "blip_2_qformer", "hidden_size": 32, "num_attention_heads": 2,
            "intermediate_size": 48, "num_hidden_layers": 2, "encoder_hidden_size": 40, **NO_DROPOUT,
        },
    )  # fmt: skip
    return GraniteSpeechEncoderProjector(config), torch.randn(2, 67, 40)  # the last window is padded


def granite_vision():
    from transformers import Granite4VisionConfig
    from transformers.models.granite4_vision.modeling_granite4_vision import (
        Granite4VisionWindowQFormerDownsampler,
    )

    config = Granite4VisionConfig(
        text_config={"model_type": "granite4_vision_text", "hidden_size": 24},
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 64, "image_size": 32, "patch_size": 4,
        },
        qformer_config={
            "model_type": "blip_2_qformer", "hidden_size": 64, "encoder_hidden_size": 64,
            "num_attention_heads": 1, "intermediate_size": 48, "num_hidden_layers": 2, **NO_DROPOUT,
        },
        downsample_rate="2/4", projector_dropout=0.0,
    )  # fmt: skip
    model = Granite4VisionWindowQFormerDownsampler(config)
    for parameter in (model.query, model.image_positions):
        nn.init.normal_(parameter)
    return model, torch.randn(2, 64, 64)


PROJECTORS = {"Granite Speech": granite_speech, "Granite Vision": granite_vision}


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_of_many_windows(name, calls):
    model, features = PROJECTORS[name]()
    assert_alike(*both(model.eval(), features))
    model, features, found = model.double().train(), features.double(), []
    for change in (unfuse, fuse):
        change(model).zero_grad()
        model(features).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert_same_gradients(found[1], found[0], torch.float64)
    half = model.eval().to(torch.bfloat16)
    with torch.no_grad():
        truth = unfuse(copy.deepcopy(half)).double()(features.bfloat16().double())
        plain, ours = both(half, features.bfloat16())
    assert_yardstick(name, ours, plain, truth)
    assert len(calls) == 3
