"""`explain()` says what is done: the plan's table against what a pass does, whatever was changed."""

import pytest
import torch
from test_encoder import MASK, B, encode, inputs, qformer
from torch import nn

from blip2_kernels.encoder import FusedEncoder, Saving, Workload
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask

TOKENS = 180
"""Image tokens: enough for the absorbed form to be the cheaper one."""


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def crossing(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.encoder.layer if hasattr(layer, "crossattention")]


def checkpointed(model: nn.Module) -> None:
    model.gradient_checkpointing = True
    model.train()


def dropping(model: nn.Module) -> None:
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.3
    for layer in crossing(model):
        layer.crossattention.attention.attention_dropout = 0.3
    model.train()


CHANGES = {
    "nothing": lambda model, norm: None,
    "first layer": lambda model, norm: hook(model.encoder.layer[0]),
    "middle layer": lambda model, norm: hook(model.encoder.layer[1]),
    "last layer": lambda model, norm: hook(model.encoder.layer[-1]),
    "one image key": lambda model, norm: hook(crossing(model)[-1].crossattention.attention.key),
    "every image value": lambda model, norm: [
        hook(layer.crossattention.attention.value) for layer in crossing(model)
    ],
    "every layer that looks": lambda model, norm: [hook(layer) for layer in crossing(model)],
    "image norm": lambda model, norm: hook(norm),
    "first query": lambda model, norm: hook(model.encoder.layer[0].attention.attention.query),
    "checkpointing": lambda model, norm: checkpointed(model),
    "dropout": lambda model, norm: dropping(model),
}


def rows_of(module: nn.Module, seen: list[int]) -> None:
    former = module.__class__.forward

    class Counting(type(module)):
        def forward(self, x):
            seen.append(x.flatten(0, -2).shape[0])
            return former(self, x)

    module.__class__ = Counting


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_table_says_what_is_done(change, gradients):
    model, norm = qformer(), nn.LayerNorm(10).double()
    queries, text, _ = inputs()
    features = torch.randn(4, TOKENS, 10, dtype=torch.float64)
    CHANGES[change](model, norm)
    encoder = FusedEncoder(model, call_layer=lambda layer, call: call.hidden)
    first_rows: list[int] = []
    last_rows: list[int] = []
    # Linear layers of self-attention are called whatever class they are of, so they may count.
    rows_of(model.encoder.layer[0].attention.attention.query, first_rows)
    rows_of(model.encoder.layer[-1].attention.attention.query, last_rows)
    layout = TokenLayout.from_attention_masks(5, [MASK])
    rows = int(MASK.sum())
    work = Workload(
        *(4, 5, (B,), (rows,), (16,)),
        images=4,
        image_tokens=TOKENS,
        looking_rows=1,
        gradients=gradients,
        keep_texts=("none",),
    )
    with torch.set_grad_enabled(gradients):
        images = encoder.project_images(features, norm=norm, query_rows=1)
        encode(
            encoder,
            queries[:1],
            [text],
            layout,
            AttentionMask((B,)),
            images,
            keep_texts=("none",),
            dropout_key=torch.tensor(1),
        )
        explained = encoder.explain(work, norm)
    table = {line.split()[0]: line.split()[1] == "yes" for line in explained.splitlines()[1:] if line}
    made = [key_values for key_values in images.layers if key_values is not None]
    done = {
        Saving.ABSORBED: images.absorbed,
        Saving.SHARED_FIRST_LAYER: bool(first_rows) and first_rows[0] == 5 + rows,
        Saving.DEAD_ROWS: bool(last_rows) and last_rows[-1] == 20,
    }
    if not images.absorbed:  # else no layer has keys and values
        done[Saving.PROJECT_ONCE] = bool(made)
        if made:
            done[Saving.BIAS_IDENTITIES] = any(one.context_bias is not None for one in made)
    if change != "every image value":
        done[Saving.NO_IMAGE_GRADIENT] = images.features.norm is not None
    if change == "every layer that looks":  # nobody reads them before their norm
        done.pop(Saving.NO_IMAGE_GRADIENT)
        assert not table[Saving.NO_IMAGE_GRADIENT]
    assert {saving: table[saving] for saving in done} == done, explained


def test_every_changed_projection_leaves_nothing_to_read_past():
    model, norm = qformer(), nn.LayerNorm(10).double()
    work = Workload(4, 5, images=4, image_tokens=TOKENS, gradients=True)
    encoder = FusedEncoder(model)
    before = [line.split()[:2] for line in encoder.explain(work, norm).splitlines()]
    assert [Saving.NO_IMAGE_GRADIENT, "yes"] in before and [Saving.BIAS_IDENTITIES, "yes"] in before
    CHANGES["every image value"](model, norm)
    lines = encoder.explain(work, norm).splitlines()
    declined = [line for line in lines if "the image value has hooks in layer 0" in line]
    assert [line.split()[0] for line in declined] == [Saving.NO_IMAGE_GRADIENT, Saving.BIAS_IDENTITIES]


@torch.no_grad()
def test_a_self_attention_that_is_not_joined_is_named():
    model = qformer()
    encoder = FusedEncoder(model).prepare_inference().force(joined_projections=True)
    work = Workload(4, 5, images=4, image_tokens=7)
    assert "goes without" not in encoder.explain(work)
    hook(model.encoder.layer[1].attention.attention.value)
    assert "layer 1 goes without joined_projections: its value has hooks" in encoder.explain(work)
