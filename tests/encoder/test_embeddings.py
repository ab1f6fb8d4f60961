"""The encoder's first rows from token ids: one compiled operator where modules are as built, else those."""

import pytest
import torch
from compiled_cases import needs_extension
from test_encoder import MASK, qformer
from test_epilogues import Calls
from tolerances import max_error
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from blip2_kernels.encoder import FusedEncoder
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask, MaskMode
from blip2_kernels.model.qformer import TextEmbeddings

IDS = torch.tensor([[4, 9, 4, 0], [0, 7, 0, 9], [1, 2, 3, 4], [0, 0, 29, 4]])
KINDS = [Blip2TextEmbeddings, TextEmbeddings]


def parts(kind, padded, dtype=torch.float32, **options):
    model = qformer(**options).to(dtype)
    config = Blip2QFormerConfig(
        hidden_size=24, num_attention_heads=3, vocab_size=30, max_position_embeddings=8
    )
    embeddings = kind(config).to(dtype)
    encoder, layout = FusedEncoder(model), TokenLayout.from_attention_masks(5, [MASK], padded=padded)
    images = encoder.project_images(torch.randn(4, 6, 10, dtype=dtype))
    queries, key = torch.randn(1, 5, 24, dtype=dtype), torch.tensor(5)

    def run(texts, **given):
        mask = AttentionMask((MaskMode.BIDIRECTIONAL,))
        return encoder(queries, texts, layout, mask, images, dropout_key=key, **given).rows

    return model, embeddings, layout, run


@needs_extension
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_give_what_embedded_rows_give(kind, padded, drops):
    rates = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.0)
    model, embeddings, layout, run = parts(kind, padded, **rates if drops else {})
    model.train(drops)
    with Calls() as calls:
        rows = run([IDS], embeddings=embeddings)
    assert calls.names.count("embed_tokens") == 1
    text = embeddings(IDS).flatten(0, 1)[layout.texts[0].source]
    with Calls() as calls:
        expected = run([text])
    assert calls.names.count("embed_tokens") == 1  # which reads the embedded rows one by one
    assert max_error(rows.detach(), expected.detach()) < 1e-4
    tables = list(embeddings.parameters())
    grad = torch.randn_like(rows)
    for a, b in zip(*(torch.autograd.grad(r, tables, grad) for r in (rows, expected)), strict=True):
        assert max_error(a, b) < 1e-3 * float(b.abs().max())
    own = torch.tensor([[3, 1, 0, 2]])
    moved = run([IDS], embeddings=embeddings, position_ids=[own])
    text = embeddings(IDS, own.expand(4, -1)).flatten(0, 1)[layout.texts[0].source]
    assert max_error(moved.detach(), run([text]).detach()) < 1e-4


@pytest.mark.parametrize("part", ["", "word_embeddings", "position_embeddings"])
def test_a_hook_is_called(part):
    _, embeddings, layout, run = parts(TextEmbeddings, False)
    embeddings.get_submodule(part).register_forward_hook(lambda module, inputs, output: output * 2)
    with Calls() as calls:
        rows = run([IDS], embeddings=embeddings)
    assert "embed_tokens" not in calls.names
    text = embeddings(IDS).flatten(0, 1)[layout.texts[0].source]
    assert max_error(rows.detach(), run([text]).detach()) < 1e-4


@pytest.mark.parametrize("change", ["norm", "dtype", "max_norm", "other class"])
def test_other_modules_run_as_they_are(change):
    dtype = torch.float64 if change == "dtype" else torch.float32
    model, embeddings, layout, run = parts(TextEmbeddings, False, dtype)
    if change == "norm":
        model.layernorm.register_forward_hook(lambda module, inputs, output: output * 2)
    elif change == "max_norm":
        embeddings.word_embeddings.max_norm = 0.5
    elif change == "other class":
        embeddings.__class__ = type("Own", (TextEmbeddings,), {"__module__": "elsewhere"})
    with Calls() as calls:
        rows = run([IDS], embeddings=embeddings)
    assert "embed_tokens" not in calls.names
    text = embeddings(IDS).flatten(0, 1)[layout.texts[0].source]
    assert max_error(rows.detach(), run([text]).detach()) < 1e-4


def test_refusals():
    _, embeddings, _, run = parts(TextEmbeddings, False)
    with pytest.raises(ValueError, match="position_ids: expected embeddings beside it, got None"):
        run([IDS], position_ids=[None])
    with pytest.raises(TypeError, match=r"texts\[0\]: expected int64 or int32 \[4, 4\], got float32"):
        run([IDS.float()], embeddings=embeddings)
    with pytest.raises(ValueError, match="expected values in"):
        run([IDS + 1], embeddings=embeddings)
