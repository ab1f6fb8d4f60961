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
    model = kind(config(**SIZES, **extra, **options)).double().eval()
    for name, parameter in model.named_parameters():
        # Sharp attention and lively norms: a wrong score must move the output by far more than rounding.
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if "orm.weight" in name else torch.nn.init.normal_(
            parameter
        )
    return model


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
    rows = encoder(
        layout.pack(queries, [text]), layout, AttentionMask((B,)), encoder.project_images(features)
    )
    if not padded:
        expected = expected * whole[..., None]
    got = torch.cat([layout.unpack_queries(rows), layout.unpack_text(rows)], 1)
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
    rows = encoder(layout.pack(queries), layout, AttentionMask(), images)
    assert max_error(layout.unpack_queries(rows), expected.last_hidden_state) < 1e-10


def test_one_pass_equals_its_parts():
    """Queries, contrastive text and caption side by side give what three passes give."""
    model = qformer()
    queries, text, features = inputs()
    caption, flipped = torch.randn_like(text), MASK.flip(1)
    encoder = FusedEncoder(model)
    images = encoder.project_images(features)
    both = TokenLayout.from_attention_masks(5, [MASK, flipped])
    rows = encoder(both.pack(queries, [text, caption]), both, AttentionMask((U, C)), images)

    alone = TokenLayout.from_attention_masks(5, samples=4)
    assert (
        max_error(
            both.unpack_queries(rows),
            encoder(queries.flatten(0, 1), alone, AttentionMask(), images).view(4, 5, 24),
        )
        < 1e-12
    )
    contrastive = TokenLayout.from_attention_masks(0, [MASK])
    expected = encoder(contrastive.pack(None, [text]), contrastive, AttentionMask((U,)))
    assert max_error(both.unpack_text(rows, 0), contrastive.unpack_text(expected)) < 1e-12
    grounded = TokenLayout.from_attention_masks(5, [flipped])
    expected = encoder(grounded.pack(queries, [caption]), grounded, AttentionMask((C,)), images)
    assert max_error(both.unpack_text(rows, 1), grounded.unpack_text(expected)) < 1e-12


def test_an_image_is_projected_once_for_all_its_samples():
    model = qformer()
    queries, text, features = inputs()
    encoder = FusedEncoder(model)
    layout = TokenLayout.from_attention_masks(5, [MASK])
    index = torch.tensor([1, 1, 0, 1], dtype=torch.int32)
    packed = layout.pack(queries, [text])
    calls = []
    handle = model.encoder.layer[0].crossattention.attention.key.register_forward_hook(
        lambda module, args, out: calls.append(args[0].shape[0])
    )
    shared = encoder(packed, layout, AttentionMask((B,)), encoder.project_images(features[:2]), index)
    handle.remove()
    repeated = encoder(packed, layout, AttentionMask((B,)), encoder.project_images(features[index.long()]))
    assert calls == [2]
    assert max_error(shared, repeated) < 1e-12


def test_dropout_does_not_depend_on_packing_or_on_the_number_of_passes():
    model = qformer(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).train()
    queries, text, features = inputs()
    encoder, key = FusedEncoder(model), torch.tensor(42)
    images = encoder.project_images(features)

    def queries_of(layout, rows, mask):
        return layout.unpack_queries(encoder(rows, layout, mask, images, dropout_key=key))

    alone = TokenLayout.from_attention_masks(5, samples=4)
    expected = queries_of(alone, queries.flatten(0, 1), AttentionMask())
    for padded in (False, True):
        both = TokenLayout.from_attention_masks(5, [MASK, MASK], padded=padded)
        got = queries_of(both, both.pack(queries, [text, text]), AttentionMask((U, C)))
        assert max_error(got, expected) < 1e-12
    other = encoder(queries.flatten(0, 1), alone, AttentionMask(), images, dropout_key=torch.tensor(43))
    assert not torch.allclose(other.view(4, 5, 24), expected)
    torch.manual_seed(3)
    first = encoder(queries.flatten(0, 1), alone, AttentionMask(), images)
    torch.manual_seed(3)
    assert torch.equal(first, encoder(queries.flatten(0, 1), alone, AttentionMask(), images))
    model.eval()
    calm = encoder(queries.flatten(0, 1), alone, AttentionMask(), images, dropout_key=key)
    assert not torch.allclose(calm.view(4, 5, 24), expected)


def test_hooks_and_adapters_on_linears_are_respected():
    model = qformer()
    queries, _, features = inputs()
    encoder, layout = FusedEncoder(model), TokenLayout.from_attention_masks(5, samples=4)
    rows = queries.flatten(0, 1)
    before = encoder(rows, layout, AttentionMask(), encoder.project_images(features))
    query = model.encoder.layer[1].attention.attention.query
    handle = query.register_forward_hook(lambda module, args, out: -out)
    hooked = encoder(rows, layout, AttentionMask(), encoder.project_images(features))
    expected = model(queries, encoder_hidden_states=features).last_hidden_state.flatten(0, 1)
    assert max_error(hooked, expected) < 1e-10 and max_error(hooked, before) > 1e-3
    handle.remove()


def test_bad_input():
    model = qformer()
    queries, _, features = inputs()
    encoder, layout = FusedEncoder(model), TokenLayout.from_attention_masks(5, samples=4)
    rows, images = queries.flatten(0, 1), encoder.project_images(features)
    cases = [
        (lambda: encoder(rows[:-1], layout, AttentionMask(), images), ValueError, "rows: expected [20, 24]"),
        (lambda: encoder(rows, None, AttentionMask(), images), TypeError, "layout: expected a TokenLayout"),
        (lambda: encoder(rows, layout, None, images), TypeError, "mask: expected an AttentionMask"),
        (
            lambda: encoder(rows, layout, AttentionMask((B,)), images),
            ValueError,
            "layout: expected 1 text segments",
        ),
        (lambda: encoder(rows, layout, AttentionMask()), ValueError, "images: expected ImageKeyValues where"),
        (
            lambda: encoder.project_images(features[0]),
            ValueError,
            "encoder_hidden_states: expected [images, tok",
        ),
        (
            lambda: encoder.project_images(features[..., :9]),
            ValueError,
            "expected [images, tokens, 10], got [4, 6, 9]",
        ),
        (
            lambda: encoder.project_images(features, mask=torch.full((4, 6), 2)),
            ValueError,
            "encoder_attention_mask: expected only 0 and 1, got 2",
        ),
        (
            lambda: encoder(rows, layout, AttentionMask(), encoder.project_images(features[:3])),
            ValueError,
            "image_index: expected int32 [4] where 4 samples meet 3 images",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)
