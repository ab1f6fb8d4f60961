"""The closed forms that the demo starts from, on pictures of known content: one code a thing, linear."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from blip2_kernels.model.demo import assets, warm_start
from blip2_kernels.model.demo.concepts import TRAINED, with_article
from blip2_kernels.model.demo.scenes import Background, Scene, Thing
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
def test_the_soft_prompt_starts_as_words_for_what_each_query_tells_of():
    """Queries 0 and 2 know the first thing in reading order better than the second, 1 and 3 the second."""
    tokenizer, rng = assets.load_text_tokenizer(), random.Random(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = Blip2ForConditionalGeneration.from_pretraining(assets.load_stage1(4), LlamaForCausalLM(config))
    width = model.config.qformer.hidden_size
    codes, relation_codes = torch.randn(4, 2, 12, width), torch.randn(2, width)
    nouns = [rng.sample(NOUNS, 2) for _ in range(1000)]
    first, second = torch.tensor([[NOUNS.index(noun) for noun in pair] for pair in nouns]).T
    below = torch.tensor([rng.random() < 0.5 for _ in nouns])
    told, other = torch.stack([first, second] * 2), torch.stack([second, first] * 2)
    states = torch.stack(
        [own[0, t] + 0.3 * own[1, o] for own, t, o in zip(codes, told, other, strict=True)], 1
    )
    states += relation_codes[below.long()][:, None] + torch.randn(4, width) + 0.1 * torch.randn(states.shape)
    scenes = []
    for pair, is_below in zip(nouns, below.tolist(), strict=True):
        places = ((0.5, 0.2), (0.5, 0.8)) if is_below else ((0.2, 0.5), (0.8, 0.5))
        things = [Thing(noun, *place, 0.2, 0.0) for noun, place in zip(pair, places, strict=True)]
        scene = Scene(tuple(things), Background("plain", ((0, 0, 0), (0, 0, 0))))
        scenes.append(scene.swapped() if rng.random() < 0.5 else scene)
    scenes[7] = replace(scenes[7], things=scenes[7].things[:1])  # not among those that count
    states[7] = torch.nan
    reads = SimpleNamespace(encode_image=lambda image_features: image_features)
    warm_start.start_projection(model, reads, states, scenes, tokenizer)

    states[7] = 0.0
    prompt, words = model.language_projection(states), model.language_model.get_input_embeddings().weight
    norm = prompt.square().sum(-1).mean().sqrt()
    assert norm == pytest.approx(words.norm(dim=1).mean().item(), rel=0.1)

    def of(phrase):
        return words[tokenizer(phrase, add_special_tokens=False)["input_ids"]].mean(0)

    known = centred(torch.stack([of(noun) for noun in NOUNS]))
    for query in range(4):
        shown = centred(prompt[:, query]) @ known.T
        assert (shown.argmax(1) == told[query]).double().mean() > 0.9
        of_told, of_other = (shown.gather(1, things[query, :, None]).mean() for things in (told, other))
        assert of_other < 0.1 * of_told
    difference = prompt[below].mean((0, 1)) - prompt[~below].mean((0, 1))
    assert F.cosine_similarity(difference, of("above") - of("left of"), dim=0) > 0.5
