"""Inference: weights kept between calls, one compiled graph, and how often the host waits for the device."""

import pytest
import torch
from test_encoder import B, encode, inputs, qformer
from torch import nn

from blip2_kernels import layout as layout_module
from blip2_kernels.encoder import FusedEncoder
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask


def norm() -> nn.LayerNorm:
    made = nn.LayerNorm(10).double()
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    return made


def read(encoder: FusedEncoder, image_norm: nn.LayerNorm, queries, features) -> torch.Tensor:
    layout = TokenLayout.from_attention_masks(5, samples=4)
    images = encoder.project_images(features, norm=image_norm)
    return encoder(queries, (), layout, AttentionMask(), images).rows


def set_weight(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


CHANGES = {
    "key weight in place": lambda key, image_norm: set_weight(key.weight),
    "key weight replaced": lambda key, image_norm: setattr(key, "weight", nn.Parameter(key.weight * 1.5)),
    "norm weight in place": lambda key, image_norm: set_weight(image_norm.weight),
    "norm bias in place": lambda key, image_norm: set_weight(image_norm.bias),
    "state dict loaded": lambda key, image_norm: key.load_state_dict(
        {name: 1.5 * value for name, value in key.state_dict().items()}
    ),
    "an optimizer's step": lambda key, image_norm: step(key),
}


def step(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.3).step()


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_that_change_behind_prepare_inference_are_noticed(change):
    model, image_norm = qformer(), norm()
    queries, _, features = inputs()
    encoder = FusedEncoder(model).prepare_inference()
    before = read(encoder, image_norm, queries, features)
    kept = dict(encoder._cache.entries)
    assert torch.equal(read(encoder, image_norm, queries, features), before)
    assert all(encoder._cache.entries[name] is entry for name, entry in kept.items()), "nothing was kept"
    cross = model.encoder.layer[0].crossattention.attention
    CHANGES[change](cross.value if "key" not in change and "norm" not in change else cross.key, image_norm)
    after = read(encoder, image_norm, queries, features)
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(after, read(FusedEncoder(model), image_norm, queries, features))


@torch.no_grad()
def test_writes_through_data_are_seen_once_prepare_inference_is_called_again():
    """The blind spot that `prepare_inference` documents."""
    model, image_norm = qformer(), norm()
    queries, _, features = inputs()
    encoder = FusedEncoder(model).prepare_inference()
    before = read(encoder, image_norm, queries, features)
    model.encoder.layer[0].crossattention.attention.key.weight.data.mul_(1.5)
    assert torch.equal(read(encoder, image_norm, queries, features), before)
    after = read(encoder.prepare_inference(), image_norm, queries, features)
    assert torch.equal(after, read(FusedEncoder(model), image_norm, queries, features))


def test_kept_weights_are_not_used_where_a_gradient_is_asked_for():
    model, image_norm = qformer(), norm()
    queries, _, features = inputs()
    encoder = FusedEncoder(model).prepare_inference()
    read(encoder, image_norm, queries, features).sum().backward()
    assert not encoder._cache.entries
    assert image_norm.weight.grad is not None


MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_one_graph_holds_a_pass_in_static_shapes(gradients):
    """Padded rows, so that no shape depends on a text: what a CUDA graph needs."""
    model, image_norm = qformer(), norm()
    queries, text, features = inputs()
    encoder = FusedEncoder(model)

    def run(queries, text, features, mask):
        layout = TokenLayout.from_attention_masks(5, [mask], padded=True)
        images = encoder.project_images(features, norm=image_norm, query_rows=20)
        return encode(
            encoder, queries, [text], layout, AttentionMask((B,)), images, keep_texts=("none",)
        ).rows

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        expected = run(queries, text, features, MASK)
        got = compiled(queries, text, features, MASK)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        # Other texts of the same padded size: the same graph.
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(queries, text, features, MASK.flip(0))
    if gradients:
        truth = torch.autograd.grad(expected.sum(), image_norm.weight)[0]
        torch.testing.assert_close(torch.autograd.grad(got.sum(), image_norm.weight)[0], truth)


@pytest.mark.parametrize(("padded", "waits"), [(False, 1), (True, 0)], ids=["packed", "padded"])
def test_the_host_waits_once_for_a_packed_pass_and_never_for_a_padded_one(padded, waits, monkeypatch):
    """On tensors without data, where reading any value raises; the one place that may read is counted."""
    seen = []

    def sizes_of(sizes):
        seen.append(sizes)
        return 16, 4, 0

    monkeypatch.setattr(layout_module, "read_sizes", sizes_of)
    model = qformer().to("meta")
    queries, text, features = (t.to("meta") for t in inputs())
    layout = TokenLayout.from_attention_masks(5, [MASK.to("meta")], padded=padded)
    encoder = FusedEncoder(model)
    images = encoder.project_images(features, norm=norm().to("meta"))
    out = encode(encoder, queries, [text], layout, AttentionMask((B,)), images, keep_texts=("none",))
    out.rows.sum().backward()
    assert len(seen) == waits
