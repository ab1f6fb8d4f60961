"""The closed forms that the demo starts from, on pictures of known content: one code a thing, linear."""

import random

import pytest
import torch
from torch.nn import functional as F

from blip2_kernels.model.demo import assets, warm_start
from blip2_kernels.model.demo.concepts import TRAINED, with_article
from blip2_kernels.model.generation import Blip2ForConditionalGeneration

NOUNS = sorted(TRAINED)[:12]
CAPTIONS = [f"{with_article(first)} left of {with_article(second)}" for first in NOUNS for second in NOUNS]


@pytest.fixture(scope="module")
def pictures():
    """(features [144, 16, 1280] of a 4 x 4 grid, code [12, 1280] of each noun): two of the tokens show the
    two things of the caption, the others noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codes, rng = torch.randn(len(NOUNS), 1280), random.Random(0)
        features = 0.1 * torch.randn(len(CAPTIONS), 16, 1280)
    for picture, (first, second) in zip(
        features, [(a, b) for a in range(12) for b in range(12)], strict=True
    ):
        for cell, noun in zip(rng.sample(range(16), 2), (first, second), strict=True):
            picture[cell] += codes[noun]
    return features, codes


def centred(rows):
    return F.normalize(rows - rows.mean(0), dim=1)


@torch.no_grad()
def test_an_image_token_is_read_as_the_words_for_what_it_shows(pictures):
    features, codes = pictures
    model, tokenizer = assets.load_stage1(4), assets.load_text_tokenizer()
    warm_start.start_in_words(model, features, CAPTIONS, tokenizer)
    rows = tokenizer(NOUNS, add_special_tokens=False)["input_ids"]
    words = torch.stack([model.embeddings.word_embeddings.weight[row].mean(0) for row in rows])
    for layer in model.qformer.encoder.layer[::2]:
        cross = layer.crossattention
        read = cross.output.dense(cross.attention.value(model.ln_vision(codes)))
        assert (centred(read) @ centred(words).T).argmax(1).tolist() == list(range(12))
    norms = read.norm(dim=1)
    assert norms.min() > 0.5 * 384**0.5  # a token that shows something speaks at least as loud as a word does


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_text_reads_the_queries_about_as_it_reads_text(pictures, device):
    """Where the means of their states differ, a query gets a tenth of what a text token gets."""
    features, _ = pictures
    model, tokenizer = assets.load_stage1(4).eval().to(device), assets.load_text_tokenizer()
    warm_start.start_in_words(model, features, CAPTIONS, tokenizer)
    told = tokenizer(CAPTIONS[:16], return_tensors="pt", padding=True).to(device)
    mask = told["attention_mask"].bool()
    rows = torch.cat([model.query_tokens.expand(16, -1, -1), model.embeddings(told["input_ids"])], 1)
    attentions = model.qformer(
        rows,
        F.pad(mask.long(), (4, 0), value=1),
        encoder_hidden_states=model.ln_vision(features[:16].to(device)),
        query_length=4,
        output_attentions=True,
    ).attentions
    for layer in attentions:
        paid = layer[:, :, 4:, :4].sum(-1).transpose(1, 2)[mask].mean().item()
        assert paid / 4 > 0.3 * (1 - paid) / mask.sum(1).double().mean().item()


@torch.no_grad()
def test_the_soft_prompt_starts_as_words_for_the_cell_and_its_place(pictures):
    from transformers import LlamaConfig, LlamaForCausalLM

    features, _ = pictures
    stage1, tokenizer = assets.load_stage1(4).eval(), assets.load_text_tokenizer()
    warm_start.start_in_words(stage1, features, CAPTIONS, tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = Blip2ForConditionalGeneration.from_pretraining(stage1, LlamaForCausalLM(config))
    warm_start.start_projection(model, features, CAPTIONS, tokenizer)

    prompt = model.soft_prompt(image_features=features)
    words = model.language_model.get_input_embeddings().weight
    norm = prompt.square().sum(-1).mean().sqrt()
    assert norm == pytest.approx(words.norm(dim=1).mean().item(), rel=0.1)
    # Queries 0 to 3 look at the cells of a 2 x 2 grid, row by row.
    top_left, top_right, bottom_left, bottom_right = prompt.mean(0)
    left, right, top, bottom = words[tokenizer.convert_tokens_to_ids(["left", "right", "top", "bottom"])]
    beside, above = (
        top_left + bottom_left - top_right - bottom_right,
        top_left + top_right - bottom_left - bottom_right,
    )
    assert F.cosine_similarity(beside, left - right, dim=0) > 0.5
    assert F.cosine_similarity(above, top - bottom, dim=0) > 0.5
