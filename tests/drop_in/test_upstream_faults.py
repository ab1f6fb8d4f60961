"""What transformers' `Blip2ForImageTextRetrieval` cannot do, and what it does fused.

Each test also records what transformers does by itself, so that it says when that has changed.
"""

import pytest
import torch
from small_models import IMAGE, QUERIES, assert_alike, build
from transformers import Blip2ForImageTextRetrieval

from blip2_kernels import fuse, unfuse

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=[IMAGE, None], ids=["image token", "no image token"])
def model(request):
    """Of both kinds of checkpoint: those whose texts begin with image tokens, and older ones without."""
    model = build(Blip2ForImageTextRetrieval)
    model.config.image_token_index = request.param
    return model


def texts(model, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (count, 6), generator=generator)
    mask = torch.ones_like(ids)
    if count > 1:
        mask[0, 4:] = 0
    if model.config.image_token_index is not None:
        ids = torch.cat([torch.full((count, QUERIES), IMAGE), ids], 1)
        mask = torch.cat([torch.ones(count, QUERIES, dtype=torch.long), mask], 1)
    return {"input_ids": ids, "attention_mask": mask}


def one_by_one(model, pixels, given):
    """What plain transformers says of each pair alone."""
    rows = [
        unfuse(model)(
            pixels[i : i + 1] if len(pixels) > 1 else pixels,
            **{name: value[i : i + 1] for name, value in given.items()},
            use_image_text_matching_head=True,
        ).logits_per_image
        for i in range(len(given["input_ids"]))
    ]
    return torch.cat(rows)


def test_one_image_is_matched_with_many_texts(model, calls):
    pixels, given = torch.randn(1, 3, 16, 16), texts(model, 4)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        unfuse(model)(pixels, **given, use_image_text_matching_head=True)
    plain = one_by_one(model, pixels, given)
    assert not calls
    ours = fuse(model)(pixels, **given, use_image_text_matching_head=True)
    torch.testing.assert_close(ours.logits_per_image, plain, atol=1e-5, rtol=0)
    assert torch.equal(ours.logits_per_text, ours.logits_per_image.t())
    assert len(calls) == 1
    found = model(pixels, **given, use_image_text_matching_head=True, return_dict=False)
    assert torch.equal(found[0], ours.logits_per_image) and len(found) == 6


def test_one_image_is_projected_once_for_many_texts(model, monkeypatch):
    projected = []
    encoder = fuse(model).qformer.fused_encoder
    project = encoder.project_images
    monkeypatch.setattr(
        encoder, "project_images", lambda t, **k: projected.append(t.shape) or project(t, **k)
    )
    model(torch.randn(1, 3, 16, 16), **texts(model, 4), use_image_text_matching_head=True)
    assert projected == [(1, 17, 32)]


def test_hidden_states_of_one_image_and_many_texts(model):
    """Which come from transformers' own path."""
    pixels, given = torch.randn(1, 3, 16, 16), texts(model, 4)
    model.qformer.config.output_hidden_states = True
    ours = fuse(model)(pixels, **given, use_image_text_matching_head=True)
    assert len(ours.text_model_output.hidden_states) == 5
    plain = one_by_one(model, pixels, given)
    torch.testing.assert_close(ours.logits_per_image, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("matching", [True, False])
def test_a_batch_of_one(model, matching, calls):
    """Works in transformers too."""
    given = texts(model, 1) | {"pixel_values": torch.randn(1, 3, 16, 16)}
    given["use_image_text_matching_head"] = matching
    plain = unfuse(model)(**given)
    assert_alike(plain, fuse(model)(**given))
    assert len(calls) == (1 if matching else 2)


@pytest.mark.parametrize("matching", [True, False])
def test_a_model_without_an_image_token_and_a_text_without_a_mask(model, matching, calls):
    given = texts(model, 2) | {"pixel_values": torch.randn(2, 3, 16, 16)}
    given["use_image_text_matching_head"] = matching
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    expected = unfuse(model)(**given)
    without = given | {"attention_mask": None}
    has_token = model.config.image_token_index is not None
    if (matching and not has_token) or (not matching and has_token):
        with pytest.raises(TypeError, match="NoneType"):
            unfuse(model)(**without)
    else:
        assert_alike(expected, unfuse(model)(**without))
    assert_alike(expected, fuse(model)(**without))
    assert calls


def test_padded_images_beside_text(model, calls):
    """The model's own image mask is all ones; here its Q-Former is given one with padding."""
    given = texts(model, 2) | {"pixel_values": torch.randn(2, 3, 16, 16)}
    given["use_image_text_matching_head"] = True
    whole = unfuse(model)(**given).logits_per_image
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    handle = model.qformer.register_forward_pre_hook(
        lambda module, args, options: (args, options | {"encoder_attention_mask": mask}), with_kwargs=True
    )
    with pytest.raises(RuntimeError):
        model(**given)
    ours = fuse(model)(**given).logits_per_image
    assert len(calls) == 1
    handle.remove()
    # What is hidden is not read: the same picture with other pixels behind the mask, its features cut short.
    cut = model.vision_model.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=output[0][:, :9], pooler_output=output[1])
    )
    alone = unfuse(model)(**{n: v[:1] if isinstance(v, torch.Tensor) else v for n, v in given.items()})
    cut.remove()
    torch.testing.assert_close(ours, torch.stack([alone.logits_per_image[0], whole[1]]), atol=1e-5, rtol=0)
    assert (ours[0] - whole[0]).abs().max() > 1e-3
