"""Inference: weights kept between calls, one compiled graph, and how often the host waits for the device."""

import pytest
import torch
from test_encoder import B, encode, inputs, qformer
from tolerances import max_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from blip2_kernels import layout as layout_module
from blip2_kernels.encoder import FusedEncoder, Workload
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


REPLACEMENTS = {
    "assigned parameters": lambda key: setattr(key, "weight", nn.Parameter(torch.randn_like(key.weight))),
    "assigned state dicts": lambda key: key.load_state_dict(
        {name: torch.randn_like(value) for name, value in key.state_dict().items()}, assign=True
    ),
    "assigned data": lambda key: setattr(key.weight, "data", torch.randn_like(key.weight)),
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


@pytest.mark.parametrize("change", REPLACEMENTS)
@torch.no_grad()
def test_weights_replaced_twice_are_noticed_though_memory_is_used_again(change):
    """The second replacement often lands where the first weights lay."""
    model, image_norm = qformer(), norm()
    queries, _, features = inputs()
    encoder = FusedEncoder(model).prepare_inference()
    key = model.encoder.layer[0].crossattention.attention.key
    for _ in range(30):
        read(encoder, image_norm, queries, features)
        for _ in range(2):
            REPLACEMENTS[change](key)
        got = read(encoder, image_norm, queries, features)
        assert torch.equal(got, read(FusedEncoder(model), image_norm, queries, features))


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


# ---------------------------------------------------------------------------------------- joined projections


class Products(TorchDispatchMode):
    """Counts matrix products with weights [out, in] by out."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.addmm.default:
            self.widths.append(args[2].shape[1])
        return function(*args, **(kwargs or {}))


def everything(encoder: FusedEncoder) -> torch.Tensor:
    """Queries and a text that read one another; of the last layer the queries alone are kept."""
    torch.manual_seed(0)
    queries, text, features = inputs()
    layout = TokenLayout.from_attention_masks(5, [MASK])
    images = encoder.project_images(features)
    rows = text[MASK.bool()]
    return encoder(queries, [rows], layout, AttentionMask((B,)), images, keep_texts=["none"]).rows


@torch.no_grad()
def test_joined_projections_are_one_product_where_there_were_three():
    model = qformer()
    hidden, layers = model.config.hidden_size, len(model.encoder.layer)
    with Products() as apart:
        expected = everything(FusedEncoder(model))
    encoder = FusedEncoder(model).prepare_inference().force(joined_projections=True)
    everything(encoder)
    with Products() as joined:
        got = everything(encoder)
    assert max_error(got, expected) <= 1e-12
    # In the last layer the queries' rows are not the keys' and values'.
    assert joined.widths.count(3 * hidden) == layers - 1 and joined.widths.count(2 * hidden) == 1
    assert len(apart.widths) - len(joined.widths) == 2 * (layers - 1) + 1


@torch.no_grad()
def test_joined_projections_are_declined_on_a_cpu():
    model = qformer()
    encoder = FusedEncoder(model).prepare_inference()
    with Products() as products:
        everything(encoder)
    assert 3 * model.config.hidden_size not in products.widths
    explained = encoder.explain(Workload(4, 5, images=4, image_tokens=7))
    assert "one large product takes as long as three" in explained


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "replaced", "hook"])
def test_joined_weights_follow_the_modules_they_are_made_of(change):
    model = qformer()
    encoder = FusedEncoder(model).prepare_inference().force(joined_projections=True)
    before = everything(encoder)
    query = model.encoder.layer[0].attention.attention.query
    if change == "in place":
        set_weight(query.weight)
    elif change == "replaced":
        query.weight = nn.Parameter(query.weight * 1.5)
    else:
        query.register_forward_hook(lambda module, args, output: 1.5 * output)
    after = everything(encoder)
    assert not torch.allclose(after, before, atol=1e-4)
    assert max_error(after, everything(FusedEncoder(model))) <= 1e-12


@torch.no_grad()
def test_projections_with_and_without_a_bias_are_not_joined():
    model = qformer()
    model.encoder.layer[0].attention.attention.key.bias = None
    encoder = FusedEncoder(model).prepare_inference().force(joined_projections=True)
    assert max_error(everything(encoder), everything(FusedEncoder(model))) <= 1e-12


def test_joined_projections_forced_on_where_weights_are_not_kept():
    encoder = FusedEncoder(qformer()).force(joined_projections=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"joined_projections: .*was not called"):
        everything(encoder)
    with pytest.raises(ValueError, match=r"joined_projections: .*a gradient is asked for"):
        everything(encoder.prepare_inference())


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
