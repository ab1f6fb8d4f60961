"""Whole models as one graph: `torch.compile(fullgraph=True)` on static shapes, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from pretraining_cases import small_batch, small_model, some_negatives
from test_savings import stage2_case
from torch import Tensor


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_one_graph(call: Callable[..., Tensor], *arguments: Tensor) -> None:
    """The graph exists, gives the same, and serves other values of the same shapes."""
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), call(*arguments), rtol=0, atol=1e-10)
    others = [x.flip(0) for x in arguments]
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(*others), call(*others), rtol=0, atol=1e-10)


def stage1() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Padded rows: no shape depends on a text."""
    model, inputs = small_model(dtype=torch.float64, use_fused=True), small_batch(4)
    model.qformer.fused_encoder.force(packed_text=False)
    return model, inputs | {"image_features": inputs["image_features"].double()}


@pytest.mark.parametrize("prepared", [False, True], ids=["at once", "prepared"])
@torch.no_grad()
def test_reading_images(prepared):
    """At once: the encoder is not there yet when the graph is made."""
    model = small_model(dtype=torch.float64, use_fused=True)
    if prepared:
        model.qformer.fused_encoder.prepare_inference()
    assert_one_graph(model.encode_image, small_batch(4)["image_features"].double())


@torch.no_grad()
def test_reading_images_that_were_projected_before():
    model, inputs = stage1()
    images = model.prepare_images(inputs["image_features"])

    def match(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model.match(model.multimodal_hidden(images, input_ids, attention_mask))

    assert_one_graph(match, inputs["input_ids"], inputs["attention_mask"])


@torch.no_grad()
def test_reading_images_and_texts():
    model, inputs = stage1()
    texts = inputs["input_ids"], inputs["attention_mask"]
    assert_one_graph(model.get_multimodal_features, *texts, inputs["image_features"])


def test_a_step_of_stage_1():
    model, inputs = stage1()
    negatives = some_negatives(4)

    def losses(input_ids: Tensor, attention_mask: Tensor, image_features: Tensor) -> Tensor:
        out = model(input_ids, attention_mask, image_features=image_features, negatives=negatives)
        return torch.stack([out.loss_itc, out.loss_itm, out.loss_itg])

    arguments = inputs["input_ids"], inputs["attention_mask"], inputs["image_features"]
    assert_one_graph(losses, *arguments)
    parameter = model.qformer.encoder.layer[0].crossattention.attention.value.weight
    expected = torch.autograd.grad(losses(*arguments).sum(), parameter)[0]
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*arguments).sum(), parameter)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("instruct", [False, True], ids=["blip2", "instructblip"])
def test_a_soft_prompt(instruct, gradients):
    model, inputs = stage2_case(instruct, torch.float64, 0.0)
    model.use_fused = True
    model.qformer.fused_encoder.force(packed_text=False)
    text = ("qformer_input_ids", "qformer_attention_mask") if instruct else ()

    def prompt(image_features: Tensor, *texts: Tensor) -> Tensor:
        return model.soft_prompt(image_features=image_features, **dict(zip(text, texts, strict=True)))

    with torch.set_grad_enabled(gradients):
        assert_one_graph(prompt, inputs["image_features"], *(inputs[name] for name in text))
