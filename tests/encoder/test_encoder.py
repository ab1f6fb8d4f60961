"""FusedEncoder on live transformers modules: equal rows, whatever the packing."""

import pytest
import torch
from tolerances import max_error
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from blip2_kernels.encoder import FusedEncoder
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode

U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL
SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
SIZES |= dict(encoder_hidden_size=10, vocab_size=30)
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]])


def qformer(kind=Blip2QFormerModel, config=Blip2QFormerConfig, **options):
    torch.manual_seed(0)
    extra = {"use_qformer_text_input": True} if config is Blip2QFormerConfig else {}
    model = kind(config(**{**SIZES, **extra, **options})).double().eval()
    for name, parameter in model.named_parameters():
        # Sharp attention and lively norms: a wrong score must move the output by far more than rounding.
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if "orm.weight" in name else torch.nn.init.normal_(
            parameter
        )
    return model


def encode(encoder, queries, texts, layout, mask, images=None, image_index=None, **options):
    """A pass on padded texts [S, T, C]."""
    rows = [text.flatten(0, 1)[segment.source] for text, segment in zip(texts, layout.texts, strict=True)]
    return encoder(queries, rows, layout, mask, images, image_index, **options)


def inputs(samples=4):
    queries = torch.randn(samples, 5, 24, dtype=torch.float64)
    text = torch.randn(samples, 4, 24, dtype=torch.float64)
    return queries, text, torch.randn(samples, 6, 10, dtype=torch.float64)


@pytest.mark.parametrize("padded", [True, False])
def test_equals_transformers_with_text(padded):
    model = qformer()
    queries, text, features = inputs()
    whole = torch.cat([torch.ones(4, 5, dtype=torch.long), MASK], 1)
    expected = model(
        torch.cat([queries, text], 1), query_length=5, attention_mask=whole, encoder_hidden_states=features
    ).last_hidden_state
    layout = TokenLayout.from_attention_masks(5, [MASK], padded=padded)
    encoder = FusedEncoder(model)
    out = encode(encoder, queries, [text], layout, AttentionMask((B,)), encoder.project_images(features))
    if not padded:
        expected = expected * whole[..., None]
    got = torch.cat([out.queries, out.padded_text()], 1)
    assert max_error(got, expected) < 1e-10


def test_equals_instructblip_with_padded_images():
    model = qformer(InstructBlipQFormerModel, InstructBlipQFormerConfig)
    queries, _, features = inputs()
    visible = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1]])
    expected = model(
        None, query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=visible
    )
    layout = TokenLayout.from_attention_masks(5, samples=4)
    encoder = FusedEncoder(model)
    images = encoder.project_images(features, mask=visible)
    out = encode(encoder, queries, [], layout, AttentionMask(), images)
    assert max_error(out.queries, expected.last_hidden_state) < 1e-10


def test_one_pass_equals_its_parts():
    """Queries, contrastive text and caption side by side give what three passes give."""
    model = qformer()
    queries, text, features = inputs()
    caption, flipped = torch.randn_like(text), MASK.flip(1)
    encoder = FusedEncoder(model)
    images = encoder.project_images(features)
    both = TokenLayout.from_attention_masks(5, [MASK, flipped])
    out = encode(encoder, queries, [text, caption], both, AttentionMask((U, C)), images)

    alone = TokenLayout.from_attention_masks(5, samples=4)
    expected = encode(encoder, queries, [], alone, AttentionMask(), images)
    assert max_error(out.queries, expected.queries) < 1e-12
    contrastive = TokenLayout.from_attention_masks(0, [MASK])
    expected = encode(encoder, None, [text], contrastive, AttentionMask((U,)))
    assert max_error(out.padded_text(0), expected.padded_text()) < 1e-12
    grounded = TokenLayout.from_attention_masks(5, [flipped])
    expected = encode(encoder, queries, [caption], grounded, AttentionMask((C,)), images)
    assert max_error(out.padded_text(1), expected.padded_text()) < 1e-12


def test_an_image_is_projected_once_for_all_its_samples():
    model = qformer()
    queries, text, features = inputs()
    encoder = FusedEncoder(model)
    layout = TokenLayout.from_attention_masks(5, [MASK])
    index = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    calls = []
    handle = model.encoder.layer[0].crossattention.attention.key.register_forward_hook(
        lambda module, args, out: calls.append(args[0].shape[0])
    )
    mask, images = AttentionMask((B,)), encoder.project_images(features[:2])
    shared = encode(encoder, queries, [text], layout, mask, images, index)
    handle.remove()
    images = encoder.project_images(features[index.long()])
    repeated = encode(encoder, queries, [text], layout, mask, images)
    assert calls == [2]
    assert max_error(shared.rows, repeated.rows) < 1e-12


def test_dropout_does_not_depend_on_packing_or_on_the_number_of_passes():
    model = qformer(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).train()
    queries, text, features = inputs()
    encoder, key = FusedEncoder(model), torch.tensor(42)
    images = encoder.project_images(features)

    def queries_of(layout, texts, mask, key=key):
        return encode(encoder, queries, texts, layout, mask, images, dropout_key=key).queries

    alone = TokenLayout.from_attention_masks(5, samples=4)
    expected = queries_of(alone, [], AttentionMask())
    for padded in (False, True):
        both = TokenLayout.from_attention_masks(5, [MASK, MASK], padded=padded)
        got = queries_of(both, [text, text], AttentionMask((U, C)))
        assert max_error(got, expected) < 1e-12
    other = queries_of(alone, [], AttentionMask(), torch.tensor(43))
    assert not torch.allclose(other, expected)
    torch.manual_seed(3)
    first = queries_of(alone, [], AttentionMask(), None)
    torch.manual_seed(3)
    assert torch.equal(first, queries_of(alone, [], AttentionMask(), None))
    model.eval()
    calm = queries_of(alone, [], AttentionMask())
    assert not torch.allclose(calm, expected)


def test_hooks_and_adapters_on_linears_are_respected():
    model = qformer()
    queries, _, features = inputs()
    encoder, layout = FusedEncoder(model), TokenLayout.from_attention_masks(5, samples=4)

    def run():
        return encoder(queries, (), layout, AttentionMask(), encoder.project_images(features)).queries

    before = run()
    query = model.encoder.layer[1].attention.attention.query
    handle = query.register_forward_hook(lambda module, args, out: -out)
    hooked = run()
    expected = model(queries, encoder_hidden_states=features).last_hidden_state
    assert max_error(hooked, expected) < 1e-10 and max_error(hooked, before) > 1e-3
    handle.remove()


def read(encoder, queries, images):
    layout = TokenLayout.from_attention_masks(5, samples=4)
    return encoder(queries, (), layout, AttentionMask(), images, dropout_key=torch.tensor(3)).rows


def test_images_of_another_model_are_refused():
    """Of equal sizes too; those of another encoder over the same model are its own."""
    model, twin = qformer(), qformer()
    queries, _, features = inputs()
    images = FusedEncoder(model).project_images(features)
    assert torch.equal(read(FusedEncoder(model), queries, images), read(FusedEncoder(model), queries, images))
    with pytest.raises(ValueError, match="images: expected what this Q-Former projected"):
        read(FusedEncoder(twin), queries, images)


@pytest.mark.parametrize("query_rows", [None, 1], ids=["projected", "absorbed"])
@torch.no_grad()
def test_images_projected_without_dropout_are_refused_where_it_is_on(query_rows):
    """Their value bias, or all of them, would go past the dropped probabilities."""
    model = qformer(attention_probs_dropout_prob=0.3)
    queries, _, features = inputs()
    encoder = FusedEncoder(model)
    images = encoder.project_images(features.repeat(1, 30, 1), query_rows=query_rows)
    assert images.absorbed == (query_rows is not None)
    read(encoder, queries, images)
    model.train()
    with pytest.raises(ValueError, match="images: expected images that were projected in training mode"):
        read(encoder, queries, images)
    images = encoder.project_images(features.repeat(1, 30, 1), query_rows=query_rows)
    assert not images.absorbed
    read(encoder, queries, images)
    model.eval()
    read(encoder, queries, images)


@pytest.mark.parametrize("trained", ["weights", "norm", "features", "nothing"])
def test_images_projected_without_gradients_are_refused_where_one_would_be_lost(trained):
    model, norm = qformer(), torch.nn.LayerNorm(10).double()
    queries, _, features = inputs()
    model.requires_grad_(trained == "weights")
    norm.requires_grad_(trained == "norm")
    features.requires_grad_(trained == "features")
    encoder = FusedEncoder(model)
    with torch.no_grad():
        images = encoder.project_images(features, norm=norm)
        read(encoder, queries, images)
    if trained == "nothing":
        read(encoder, queries.requires_grad_(), images).sum().backward()
        assert queries.grad is not None
        return
    with pytest.raises(ValueError, match=r"images: .* got some that were projected under torch.no_grad"):
        read(encoder, queries, images)


def test_bad_input():
    model = qformer()
    queries, text, features = inputs()
    encoder, layout = FusedEncoder(model), TokenLayout.from_attention_masks(5, samples=4)
    images, mask, project = encoder.project_images(features), AttentionMask(), encoder.project_images
    joint = TokenLayout.from_attention_masks(5, [MASK])
    alone, packed = TokenLayout.from_attention_masks(0, [MASK]), text.flatten(0, 1)[joint.texts[0].source]
    other = FusedEncoder(qformer(num_hidden_layers=2)).project_images(features)
    cases = [
        (
            lambda: encoder(queries[:, :-1], (), layout, mask, images),
            ValueError,
            "expected [S or 1, 5, 24], got",
        ),
        (
            lambda: encoder(queries[:3], (), layout, mask, images),
            ValueError,
            "queries: expected [4 or 1, 5, 24]",
        ),
        (lambda: encoder(None, (), layout, mask, images), TypeError, "queries: expected a tensor"),
        (lambda: encoder(queries, (), None, mask, images), TypeError, "layout: expected a TokenLayout"),
        (lambda: encoder(queries, (), layout, None, images), TypeError, "mask: expected an AttentionMask"),
        (
            lambda: encoder(queries, (), layout, AttentionMask((B,)), images),
            ValueError,
            "layout: expected 1 text segments",
        ),
        (
            lambda: encoder(queries, (), joint, AttentionMask((B,)), images),
            ValueError,
            "texts: expected 1, one a text segment, got 0",
        ),
        (
            lambda: encoder(queries, [text.flatten(0, 1)], joint, AttentionMask((B,)), images),
            ValueError,
            "texts[0]: expected [11, 24], got",
        ),
        (
            lambda: encoder(queries, [packed], alone, AttentionMask((U,))),
            ValueError,
            "queries: expected None for a layout without",
        ),
        (
            lambda: encoder(None, [packed], alone, AttentionMask((U,)), images),
            ValueError,
            "images: expected None for a layout without",
        ),
        (
            lambda: encoder(None, [packed], alone, AttentionMask((U,)), None, torch.zeros(4).int()),
            ValueError,
            "image_index: expected None for a layout without",
        ),
        (
            lambda: encoder(queries, [packed], joint, AttentionMask((B,)), images, keep_texts=("some",)),
            ValueError,
            "texts[0]: expected 'all', 'first', 'last' or 'none', got 'some'",
        ),
        (lambda: encoder(queries, (), layout, mask), ValueError, "images: expected ImageKeyValues where"),
        (
            lambda: encoder(queries, (), layout, mask, other),
            ValueError,
            "images: expected what this Q-Former projected, got what another one did",
        ),
        (lambda: project(features[0]), ValueError, "encoder_hidden_states: expected [images, tok"),
        (
            lambda: project(features[..., :9]),
            ValueError,
            "expected [images, tokens, 10], got float64 [4, 6, 9]",
        ),
        (
            lambda: project(features, mask=torch.full((4, 6), 2)),
            ValueError,
            "encoder_attention_mask: expected only 0 and 1, got 2",
        ),
        (
            lambda: project(features, frozen=False),
            ValueError,
            "frozen: expected True for features with requires_grad=False, got False",
        ),
        (
            lambda: project(features.clone().requires_grad_(), frozen=True),
            ValueError,
            "frozen: expected False for features with requires_grad=True, got True",
        ),
        (lambda: project(features, query_rows=-1), ValueError, "query_rows: expected an int >= 0, got -1"),
        (
            lambda: encoder(queries, (), layout, mask, project(features[:3])),
            ValueError,
            "image_index: expected int32 [4] where 4 samples meet 3 images",
        ),
        (
            lambda: encoder(queries, (), layout, mask, images, torch.tensor([0, 1, 2, 4]).int()),
            ValueError,
            "image_index: expected int32 [4] with values in [0, 4)",
        ),
        (lambda: encoder.force(dead_row=True), ValueError, "savings: expected names among 'project_once'"),
        (lambda: encoder.force(dead_rows=1), TypeError, "dead_rows: expected True, False or None, got int 1"),
        (lambda: encoder.explain(None), TypeError, "work: expected a Workload, got NoneType"),
    ]
    for call, error, words in cases:
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)
    with pytest.raises(ValueError, match=r"absorbed_cross_attention: .*a gradient is asked for"):
        encoder.force(absorbed_cross_attention=True).project_images(features)
    with pytest.raises(ValueError, match=r"no_image_gradient: .*features require a gradient"):
        encoder.force(no_image_gradient=True, absorbed_cross_attention=None).project_images(
            features.clone().requires_grad_(), norm=torch.nn.LayerNorm(10).double()
        )
