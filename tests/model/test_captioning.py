"""Captions with the stage-1 model: cached equals uncached, whatever the search; the cache is really used."""

import itertools

import pytest
import torch
from qformer_cases import IMAGE_WIDTH, VOCABULARY, blip2_config
from torch import nn
from transformers import GenerationConfig

from blip2_kernels.model.captioning import CaptionDecoder, generate_captions
from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining

QUERIES, SEP, DEC = 5, 2, VOCABULARY - 1
SEARCHES = {
    "greedy": {},
    "greedy without repeats": {"no_repeat_ngram_size": 1, "min_new_tokens": 6},
    "beams": {"num_beams": 3},
    "beams, two captions": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "seed": 11},
    "sampling, three captions": {"do_sample": True, "num_return_sequences": 3, "seed": 12},
    "repetition penalty": {"repetition_penalty": 1.5},
}
PROMPTS = {
    "no prompt": {},
    "one prompt": {"prompt_ids": torch.tensor([[7, 9]])},
    "padded right": {
        "prompt_ids": torch.tensor([[4, 5, 0], [6, 0, 0], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
    },
}


def build(use_fused: bool = False, seed: int = 0, std: float = 0.5) -> Blip2ForPreTraining:
    """A model whose words depend on image and place: large weights, LayerNorms as they start."""
    torch.manual_seed(seed)
    config = Blip2PreTrainingConfig(
        qformer=blip2_config(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
        cls_token_id=1,
        sep_token_id=SEP,
    )
    model = Blip2ForPreTraining(config, use_fused=use_fused)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
    nn.init.normal_(model.query_tokens)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 9, IMAGE_WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_cached_equals_uncached(images, use_fused, search, prompt):
    """Same tokens, same logits. In double precision, since weights this large amplify rounding."""
    model, images = build(use_fused).double(), images.double()
    options = {
        **SEARCHES[search],
        **PROMPTS[prompt],
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    cached, uncached = (generate_captions(model, images, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert len(cached.logits) == len(uncached.logits)
    for step, (ours, truth) in enumerate(zip(cached.logits, uncached.logits, strict=True)):
        error = (ours - truth).abs().max() / truth.abs().max().clamp(min=1)
        assert error <= 1e-5, f"step {step}: {error:.2e} of the largest logit"
    copies = SEARCHES[search].get("num_return_sequences", 1)
    assert cached.sequences.shape[0] == 3 * copies


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_cached_equals_uncached_in_single_precision(images, use_fused, num_beams):
    model = build(use_fused, std=0.15)
    options = {"num_beams": num_beams, "return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (generate_captions(model, images, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for ours, truth in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=0)


def test_words_depend_on_image_and_place(images):
    """Otherwise the comparisons above would prove little."""
    captions = generate_captions(build(), images, max_new_tokens=8)
    assert not torch.equal(captions[0], captions[1])
    assert len(captions.unique()) > 5


def test_greedy_equals_a_loop_without_any_library(images):
    """[DEC], whole text through the model at every step, the best token, until [SEP]."""
    model = build()
    captions = generate_captions(model, images[:1], max_new_tokens=8)[0]
    text = [DEC]
    with torch.no_grad():
        features = model.ln_vision(images[:1])
        decoder = CaptionDecoder(model)
        for _ in range(8):
            logits = decoder(torch.tensor([text]), visual_features=features).logits[0, -1]
            text.append(int(logits.argmax()))
            if text[-1] == SEP:
                break
    assert captions.tolist()[: len(text) - 1] == text[1:]


def test_beams_find_the_most_probable_text(images):
    """With beams as wide as the vocabulary, two tokens are searched exhaustively."""
    model = build()
    decoder = CaptionDecoder(model)
    with torch.no_grad():
        features = model.ln_vision(images[:1])

        def log_probs(text):
            return decoder(torch.tensor([text]), visual_features=features).logits[0, -1].log_softmax(-1)

        first = log_probs([DEC])
        second = torch.stack([log_probs([DEC, token]) for token in range(VOCABULARY)])
    joint = first[:, None] + second
    pairs = itertools.product(range(VOCABULARY), range(VOCABULARY))
    best = max((pair for pair in pairs if SEP not in pair), key=lambda pair: joint[pair])
    caption = generate_captions(
        model, images[:1], max_new_tokens=2, num_beams=VOCABULARY, suppress_tokens=[SEP]
    )
    # Suppressing [SEP] leaves the order of the others as it is.
    assert caption[0].tolist() == list(best)


def test_each_row_is_run_once(images, monkeypatch):
    """Rows that the Q-Former sees: with the cache the queries once and each token once a beam."""
    model = build()
    rows = []
    forward = type(model.qformer).forward

    def counting(self, query_embeds, *args, **kwargs):
        rows.append((query_embeds.shape[0], query_embeds.shape[1]))
        return forward(self, query_embeds, *args, **kwargs)

    monkeypatch.setattr(type(model.qformer), "forward", counting)
    steps = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
    generate_captions(model, images, **steps)
    assert rows == [(3, QUERIES)] + 6 * [(6, 1)]
    rows.clear()
    generate_captions(model, images, use_cache=False, **steps)
    assert rows == [(6, QUERIES + 1 + step) for step in range(6)]
    rows.clear()
    generate_captions(model, images, prompt_ids=torch.tensor([[7, 9, 4]]), **steps)
    assert rows == [(3, QUERIES), (6, 4)] + 5 * [(6, 1)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_ends_at_sep_and_pads(images, use_cache):
    model = build()
    with torch.no_grad():
        model.cls["predictions"].bias[SEP] = 40
    captions = generate_captions(model, images, max_new_tokens=8, use_cache=use_cache)
    assert captions.tolist() == 3 * [[SEP]]
    captions = generate_captions(model, images, max_new_tokens=8, min_new_tokens=3, use_cache=use_cache)
    assert captions.shape == (3, 4) and (captions[:, 3] == SEP).all() and (captions[:, :3] != SEP).all()


def test_hidden_image_tokens_are_not_read(images):
    model = build()
    mask = torch.ones(3, 9)
    mask[:, 5:] = 0
    other = images.clone()
    other[:, 5:] = 7
    for use_cache in (True, False):
        options = {"image_mask": mask, "use_cache": use_cache, "max_new_tokens": 8}
        assert torch.equal(
            generate_captions(model, images, **options), generate_captions(model, other, **options)
        )
        assert not torch.equal(
            generate_captions(model, images, max_new_tokens=8),
            generate_captions(model, other, max_new_tokens=8),
        )


def test_left_and_right_padded_prompts_are_the_same(images):
    model = build()
    right = PROMPTS["padded right"]
    left = {
        "prompt_ids": torch.tensor([[0, 4, 5], [0, 0, 6], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]]),
    }
    captions = [generate_captions(model, images, max_new_tokens=8, **prompt) for prompt in (right, left)]
    assert torch.equal(*captions)
    for row in range(3):
        real = right["prompt_ids"][row][right["prompt_mask"][row].bool()][None]
        alone = generate_captions(model, images[row : row + 1], max_new_tokens=8, prompt_ids=real)
        assert captions[0][row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_mode_and_random_state_are_left_as_they_were(images):
    model = build().train()
    model.qformer.encoder.layer[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generate_captions(model, images, max_new_tokens=8, do_sample=True, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(
        first, generate_captions(model.eval(), images, max_new_tokens=8, do_sample=True, seed=3)
    )
    assert not torch.equal(first, generate_captions(model, images, max_new_tokens=8, do_sample=True, seed=4))


def test_method_and_default_length(images):
    model = build()
    captions = model.caption(images, min_new_tokens=31)
    assert captions.shape[1] == model.config.max_text_length - 1
    assert torch.equal(captions, generate_captions(model, images, min_new_tokens=31))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": 4},
        {"max_new_tokens": 6, "num_beams": 3, "length_penalty": 2.0},
        {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
        {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "temperature": 1.3},
        {"num_beams": 2, "eos_token_id": 9},
    ],
    ids=str,
)
def test_a_generation_config_is_followed(images, given, use_cache):
    model = build()
    named = generate_captions(model, images, use_cache=use_cache, seed=3, **given)
    config = GenerationConfig(use_cache=use_cache, **given)
    assert torch.equal(generate_captions(model, images, generation_config=config, seed=3), named)
    assert not torch.equal(named, generate_captions(model, images))
    # Only what neither says is the default.
    assert generate_captions(model, images, generation_config=config, max_new_tokens=2).shape[1] == 2


def test_the_cache_of_a_generation_config(images, monkeypatch):
    """`use_cache` and the copies an image needs are those in effect."""
    model, asked = build(), []
    read = CaptionDecoder.cached_queries

    def asking(self, features, mask=None, copies=1):
        asked.append(copies)
        return read(self, features, mask, copies)

    monkeypatch.setattr(CaptionDecoder, "cached_queries", asking)
    for config in (
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"use_cache": False},
    ):
        generate_captions(model, images, generation_config=GenerationConfig(**config, max_new_tokens=2))
    assert asked == [1, 3, 2]
    generate_captions(model, images, generation_config=GenerationConfig(num_beams=3), num_beams=2)
    assert asked[3:] == [2]


def test_max_length_counts_what_the_caption_goes_on_from(images):
    model, prompt = build(), torch.tensor([[7, 9]])
    for options in ({"max_length": 8}, {"generation_config": GenerationConfig(max_length=8)}):
        captions = generate_captions(model, images, prompt_ids=prompt, **options)
        expected = generate_captions(model, images, prompt_ids=prompt, max_new_tokens=5)
        assert torch.equal(captions, expected) and captions.shape[1] == 5
    # As in transformers, max_new_tokens goes before it.
    assert generate_captions(model, images, max_length=8, max_new_tokens=3).shape[1] == 3


REFUSED = {
    "no image": ({"image_features": None}, ValueError, "image_features: .*neither"),
    "no encoder": (
        {"image_features": None, "pixel_values": torch.zeros(1)},
        ValueError,
        "pixel_values: .*no vision_model",
    ),
    "image width": ({"image_features": torch.zeros(3, 9, 5)}, ValueError, "image_features: .*24"),
    "image mask": ({"image_mask": torch.ones(3, 8)}, ValueError, r"image_mask: .*\[3, 9\], got .*\[3, 8\]"),
    "length": ({"max_new_tokens": 0}, ValueError, "max_new_tokens: .*>= 1, got 0"),
    "too long": ({"max_new_tokens": 41}, ValueError, "max_new_tokens: expected at most 40 .*got 41"),
    "too long by the generation_config": (
        {"generation_config": GenerationConfig(max_new_tokens=41)},
        ValueError,
        "^max_new_tokens: expected at most 40 .*got 41",
    ),
    "too long in all": ({"max_length": 42}, ValueError, "^max_length: expected at most 41 .*got 42"),
    "no room in all": (
        {"max_length": 3, "prompt_ids": torch.tensor([[7, 9]])},
        ValueError,
        "^max_length: expected at least 4 behind 3 rows of prompt, got 3",
    ),
    "shorter than the default": (
        {"min_new_tokens": 32},
        ValueError,
        "^min_new_tokens: expected at most max_new_tokens, 31, got 32",
    ),
    "field of the generation_config": (
        {"generation_config": GenerationConfig(num_beams=1.5)},
        TypeError,
        r"^generation_config\.num_beams: expected an int >= 1, got float 1.5",
    ),
    "beams": ({"num_beams": 1.5}, TypeError, "num_beams.*float"),
    "cache": ({"use_cache": 1}, TypeError, "use_cache: expected a bool, got int 1"),
    "prompt batch": ({"prompt_ids": torch.ones(2, 1).long()}, ValueError, "prompt_ids: expected .3 or 1"),
    "prompt kind": ({"prompt_ids": torch.ones(3, 1)}, TypeError, "prompt_ids: expected int64 or int32"),
    "prompt ids": ({"prompt_ids": torch.tensor([[999]])}, ValueError, r"^prompt_ids: .* got 999"),
    "prompt mask": ({"prompt_mask": torch.ones(3, 1)}, ValueError, "prompt_mask: expected prompt_ids"),
    "sampling": ({"temperature": 0.5}, ValueError, "^temperature: expected None without do_sample=True"),
    "no temperature": (
        {"temperature": 0.0, "do_sample": True},
        ValueError,
        "^temperature: expected a finite number > 0, got 0",
    ),
    "top_p": (
        {"top_p": 1.5, "do_sample": True},
        ValueError,
        "^top_p: expected a finite number > 0 and <= 1, got 1.5",
    ),
    "penalty": ({"repetition_penalty": float("nan")}, ValueError, "^repetition_penalty: .* > 0, got nan"),
    "sampled": ({"do_sample": "yes"}, TypeError, "^do_sample: expected a bool, got str 'yes'"),
    "shortest": (
        {"min_new_tokens": 9, "max_new_tokens": 3},
        ValueError,
        "^min_new_tokens: expected at most max_new_tokens, 3, got 9",
    ),
    "seed": ({"seed": -1}, ValueError, "^seed: expected an int >= 0, got -1"),
    "ours": ({"past_key_values": 5}, TypeError, "^past_key_values: expected image and prompt as named"),
    "inputs": ({"inputs": torch.ones(3, 1).long()}, TypeError, "^inputs: expected image and prompt as named"),
    "assistant": ({"assistant_model": 5}, TypeError, "^assistant_model: expected None, .* got int 5"),
    "streamer": ({"streamer": print}, TypeError, "^streamer: expected a streamer with put and end"),
    "typo": ({"top_pp": 0.3}, ValueError, "top_pp"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(images, case):
    overrides, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        generate_captions(build(), **{"image_features": images, **overrides})


def test_model_without_a_head(images):
    model = build()
    del model.cls
    with pytest.raises(TypeError, match="model: expected a Blip2ForPreTraining"):
        generate_captions(model, images)
