"""FusedEncoder on a GPU: transformers' numbers and gradients, static shapes in a CUDA graph, how often the
host waits."""

import pytest
import torch
from on_gpu import captured, synchronisations
from test_encoder import MASK as TEXT_MASK
from test_encoder import B, C, U, encode
from test_encoder import qformer as sharp_qformer
from test_inference import norm
from tolerances import WHOLE_MODEL, assert_same_gradients, max_error
from torch import nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from blip2_kernels.encoder import FusedEncoder, Saving, Workload
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SMALL = dict(hidden=24, heads=3, inner=40, width=10, layers=3, queries=5, tokens=6)
REAL = dict(hidden=768, heads=12, inner=3072, width=1408, layers=2, queries=32, tokens=257)


def text_mask() -> torch.Tensor:
    return TEXT_MASK.to(DEVICE)


def qformer(sizes, dtype=torch.float32, **rates) -> nn.Module:
    """Attention that is far from even, and norms that are no identity; rounding is not blown up."""
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["inner"],
        encoder_hidden_size=sizes["width"],
        vocab_size=30,
        use_qformer_text_input=True,
        **rates,
    )
    model = Blip2QFormerModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if "orm.weight" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1)
    return model.to(DEVICE, dtype)


def inputs(sizes, dtype=torch.float32, samples=4):
    """Queries, a text of four columns, image features."""
    shapes = [(sizes["queries"], sizes["hidden"]), (4, sizes["hidden"]), (sizes["tokens"], sizes["width"])]
    return [torch.randn(samples, *shape, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def gradients(out, model, *leaves):
    """Of a fixed projection of the output, by the parameters' names."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    named = dict(model.named_parameters()) | {f"input {i}": leaf for i, leaf in enumerate(leaves)}
    found = torch.autograd.grad((out * weight).sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


CASES = {
    "small, fp64": (SMALL, torch.float64),
    "small, fp32": (SMALL, torch.float32),
    "real, fp32": (REAL, torch.float32),
}


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, padded):
    """Queries and a text that read one another, and the images: output and all gradients."""
    sizes, dtype = CASES[case]
    model, leaves = qformer(sizes, dtype), [t.requires_grad_() for t in inputs(sizes, dtype)]
    queries, text, features = leaves
    count = queries.shape[1]
    mask = text_mask()
    whole = torch.cat([mask.new_ones(4, count), mask], 1)
    expected = model(
        torch.cat([queries, text], 1),
        query_length=count,
        attention_mask=whole,
        encoder_hidden_states=features,
    ).last_hidden_state
    expected = expected * whole[..., None]
    layout = TokenLayout.from_attention_masks(count, [text_mask()], padded=padded)
    encoder = FusedEncoder(model)
    out = encode(encoder, queries, [text], layout, AttentionMask((B,)), encoder.project_images(features))
    got = torch.cat([out.queries, out.padded_text() * mask[..., None]], 1)
    assert max_error(got, expected) <= WHOLE_MODEL[dtype] * max(1.0, float(expected.detach().abs().max()))
    assert_same_gradients(gradients(got, model, *leaves), gradients(expected, model, *leaves), dtype)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_sharp_attention_equals_the_cpu_s(padded):
    """In fp64, with weights with which a wrong score moves the output by far more than rounding."""
    model = sharp_qformer()
    shapes = [(4, 5, 24), (4, 4, 24), (4, 4, 24), (2, 6, 10)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    index = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    visible = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1]])

    def run(device):
        queries, text, caption, features = (t.to(device) for t in tensors)
        masks = [TEXT_MASK.to(device), TEXT_MASK.flip(1).to(device)]
        layout = TokenLayout.from_attention_masks(5, masks, padded=padded)
        encoder = FusedEncoder(model.to(device))
        images = encoder.project_images(features, mask=visible.to(device))
        texts, mask = [text, caption], AttentionMask((U, C))
        out = encode(encoder, queries, texts, layout, mask, images, index.to(device))
        real = [mask[..., None] * out.padded_text(i) for i, mask in enumerate(masks)]
        return [t.detach().cpu() for t in (out.queries, *real)]

    for got, expected in zip(run(DEVICE), run("cpu"), strict=True):
        assert max_error(got, expected) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_does_not_depend_on_packing_nor_on_the_number_of_passes(dtype):
    rates = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    model = qformer(SMALL, dtype, **rates).train()
    queries, text, features = inputs(SMALL, dtype)
    encoder, key = FusedEncoder(model), torch.tensor(42, device=DEVICE)

    def queries_of(layout, texts, mask):
        images = encoder.project_images(features)
        out = encode(encoder, queries, texts, layout, mask, images, dropout_key=key).queries
        return out.detach(), gradients(out, model)

    alone = TokenLayout.from_attention_masks(5, samples=4, device=DEVICE)
    expected, expected_gradients = queries_of(alone, [], AttentionMask())
    for padded in (False, True):
        both = TokenLayout.from_attention_masks(5, [text_mask(), text_mask()], padded=padded)
        got, got_gradients = queries_of(both, [text, text], AttentionMask((U, C)))
        assert max_error(got, expected) < (1e-12 if dtype == torch.float64 else 1e-5)
        assert_same_gradients(got_gradients, expected_gradients, dtype)
    model.eval()
    assert not torch.allclose(queries_of(alone, [], AttentionMask())[0], expected)


# ------------------------------------------------------------------------------------------------- inference


def reader(sizes, **forced):
    """A prepared encoder as a function of queries, text, features and mask, in static shapes."""
    encoder = FusedEncoder(qformer(sizes)).prepare_inference().force(packed_text=False, **forced)
    image_norm = norm() if sizes is SMALL else nn.LayerNorm(sizes["width"])
    image_norm = image_norm.to(DEVICE, torch.float32)

    def read(queries, text, features, mask):
        layout = TokenLayout.from_attention_masks(queries.shape[1], [mask], padded=True)
        rows = queries.shape[0] * queries.shape[1]
        images = encoder.project_images(features, norm=image_norm, query_rows=rows)
        texts, mode = [text], AttentionMask((B,))
        return encode(encoder, queries, texts, layout, mode, images, keep_texts=("none",)).rows

    return encoder, read


@torch.no_grad()
def test_each_saving_alone_changes_nothing_in_inference():
    off = {saving.value: False for saving in Saving if saving != Saving.PACKED_TEXT}
    tensors = [*inputs(SMALL), text_mask()]
    expected = reader(SMALL, **off)[1](*tensors)
    for saving in off:
        encoder, read = reader(SMALL, **off | {saving: None})
        for _ in range(2):  # the second reads what the first kept
            assert max_error(read(*tensors), expected) < 1e-5, saving
        encoder.force(**{saving: True})
        try:
            assert max_error(read(*tensors), expected) < 1e-5, f"{saving}, forced on"
        except ValueError as error:
            assert "forced on" in str(error)


@torch.no_grad()
def test_joined_projections_are_taken_on_a_gpu():
    encoder = FusedEncoder(qformer(SMALL)).prepare_inference()
    explained = encoder.explain(Workload(4, 5, images=4, image_tokens=7))
    print(explained)
    line = next(line for line in explained.splitlines() if line.startswith("joined_projections"))
    assert line.split()[1] == "yes"


@pytest.mark.parametrize("absorbed", [False, True], ids=["projected", "absorbed"])
@pytest.mark.parametrize("sizes", [SMALL, REAL], ids=["small", "real"])
@torch.no_grad()
def test_static_shapes_in_a_cuda_graph_replayed_on_other_inputs(sizes, absorbed):
    _, read = reader(sizes, absorbed_cross_attention=absorbed)
    tensors = [*inputs(sizes), text_mask()]
    graph, out = captured(lambda: read(*tensors))
    for seed in (1, 2):
        torch.manual_seed(seed)
        for static, other in zip(tensors, [*inputs(sizes), text_mask().flip(seed - 1)], strict=True):
            static.copy_(other)
        graph.replay()
        expected = read(*tensors)
        assert max_error(out, expected) < 1e-5 and torch.isfinite(out).all()


def test_a_pass_with_its_backward_in_a_cuda_graph():
    model = qformer(SMALL)
    encoder, tensors = FusedEncoder(model), inputs(SMALL)
    parameters, mask = list(model.parameters()), text_mask()

    def run():
        queries, text, features = tensors
        layout = TokenLayout.from_attention_masks(5, [mask], padded=True)
        images = encoder.project_images(features)
        out = encode(encoder, queries, [text], layout, AttentionMask((B,)), images).rows
        found = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        return [out.detach(), *(g for g in found if g is not None)]

    graph, results = captured(run)
    for t in tensors:
        t.mul_(-0.5)
    graph.replay()
    for got, expected in zip(results, run(), strict=True):
        assert max_error(got, expected) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_queries_alone_are_one_graph_under_compile(backend):
    encoder, image_norm = FusedEncoder(qformer(SMALL)), norm().to(DEVICE, torch.float32)
    queries, _, features = inputs(SMALL)

    def read(queries, features):
        layout = TokenLayout.from_attention_masks(5, samples=4, device=DEVICE)
        images = encoder.project_images(features, norm=image_norm, query_rows=20)
        return encoder(queries, (), layout, AttentionMask(), images).rows

    torch._dynamo.reset()
    compiled = torch.compile(read, fullgraph=True, backend=backend)
    assert max_error(compiled(queries, features), read(queries, features)) < 1e-4


@torch.no_grad()
def test_one_graph_holds_a_pass_with_text_in_static_shapes():
    _, read = reader(SMALL)
    tensors = [*inputs(SMALL), text_mask()]
    torch._dynamo.reset()
    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    assert max_error(compiled(*tensors), read(*tensors)) < 1e-5


@pytest.mark.parametrize(("padded", "waits"), [(False, 1), (True, 0)], ids=["packed", "padded"])
def test_the_host_waits_once_for_a_packed_pass_and_never_for_a_padded_one(padded, waits):
    rates = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model, image_norm = qformer(SMALL, **rates).train(), norm().to(DEVICE, torch.float32)
    queries, text, features = inputs(SMALL)
    encoder, mask = FusedEncoder(model), text_mask()

    def run():
        layout = TokenLayout.from_attention_masks(5, [mask], padded=padded)
        images = encoder.project_images(features, norm=image_norm)
        out = encode(encoder, queries, [text], layout, AttentionMask((B,)), images, keep_texts=("none",))
        out.rows.sum().backward()

    run()
    assert synchronisations(run) == waits
