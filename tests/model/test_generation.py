"""Stage 2: against transformers, through a frozen language model, with any padding."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    Gemma2Config,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
    OPTModel,
    T5Config,
)
from transformers import Blip2ForConditionalGeneration as TransformersBlip2
from transformers import InstructBlipForConditionalGeneration as TransformersInstructBlip

from blip2_kernels.model import supervised_rows
from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.generate_options import check_generate_options
from blip2_kernels.model.generation import Blip2ForConditionalGeneration, Blip2GenerationConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.vision import FrozenVisionEncoder

VOCABULARY, IMAGE_TOKEN, QUERIES, SIDE, WIDTH = 61, 60, 5, 28, 24
QFORMER = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    encoder_hidden_size=WIDTH,
    max_position_embeddings=32,
    vocab_size=VOCABULARY,
)
VISION = dict(
    hidden_size=WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=14,
)
SMALL = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
LANGUAGE = {
    "opt": OPTConfig(
        **SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=40, dropout=0.1, init_std=0.4
    ),
    "llama": LlamaConfig(**SMALL, intermediate_size=32, initializer_range=0.4, tie_word_embeddings=True),
    # Caps its logits behind the head.
    "gemma2": Gemma2Config(
        **SMALL,
        intermediate_size=32,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.4,
        final_logit_softcapping=2.0,
    ),
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        initializer_factor=1.0,
        tie_word_embeddings=False,
    ),
    # Adds a bias behind the head.
    "bart": BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=40,
        init_std=0.4,
        forced_eos_token_id=None,
    ),
}
DECODER_ONLY, ENCODER_DECODER = ("opt", "llama", "gemma2"), ("t5", "bart")
FROZEN = ("vision_model.", "language_model.")


@pytest.fixture(autouse=True)
def seed(request):
    value = 31400 + len(request.node.name)
    torch.manual_seed(value)
    print(f"seed {value}")


def spread(module):
    """Random weights far from their initial values, so that no two paths agree by chance."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("language_model."):
                scale = 0.3 if parameter.dim() > 1 else 0.1
                offset = 1.0 if parameter.dim() == 1 and "weight" in name else 0.0
                parameter.copy_(offset + scale * torch.randn_like(parameter))
    return module


def language_model(name):
    config = copy.deepcopy(LANGUAGE[name])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config)
    if name == "bart":
        nn.init.normal_(model.final_logits_bias)
    return model.eval()


def transformers_blip2(name):
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**QFORMER),
        text_config=copy.deepcopy(LANGUAGE[name]),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    return spread(TransformersBlip2(config)).eval()


def stage2(name, use_fused=False, dropout=0.0, **qformer):
    config = Blip2QFormerConfig(
        **{**QFORMER, **qformer}, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    return spread(
        Blip2ForConditionalGeneration(
            Blip2GenerationConfig(config, QUERIES), language_model=language_model(name), use_fused=use_fused
        )
    ).eval()


def pad(texts, side, length=None, value=1):
    """Token ids [B, T] and mask of lists of tokens, padded on a side; "scattered" puts padding anywhere."""
    length = length or max(map(len, texts)) + 2
    ids, mask = torch.full((len(texts), length), value), torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in enumerate(texts):
        places = {
            "right": torch.arange(len(text)),
            "left": torch.arange(length - len(text), length),
            "scattered": torch.randperm(length)[: len(text)].sort().values,
        }[side]
        ids[row, places], mask[row, places] = torch.tensor(text, dtype=torch.int64), 1
    return ids, mask


TEXTS = [[4, 9, 33, 7, 21, 50], [5, 8, 2], [40, 41, 42, 43, 17]]
PROMPT_LENGTHS = torch.tensor([2, 1, 3])


def features(batch=3, tokens=6):
    return torch.randn(batch, tokens, WIDTH)


GREEDY = dict(do_sample=False, pad_token_id=1, return_dict_in_generate=True, output_logits=True)


def assert_same_logits(got, expected, row=None):
    """Logits of each generated token, of all rows or of one."""
    assert len(got.logits) == len(expected.logits)
    for step, (value, truth) in enumerate(zip(got.logits, expected.logits, strict=True)):
        value = value if row is None else value[row : row + 1]
        torch.testing.assert_close(
            value, truth, rtol=0, atol=1e-4, msg=lambda text, at=step: f"step {at}: {text}"
        )


def behind_image_tokens(ids, mask):
    """What transformers wants to be given: a placeholder for each row of the soft prompt."""
    image = torch.full((len(ids), QUERIES), IMAGE_TOKEN)
    return torch.cat([image, ids], dim=1), torch.cat([torch.ones_like(image), mask], dim=1)


# --- against transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_decoder_only_logits_and_loss_equal_transformers(name, use_fused):
    theirs = transformers_blip2(name)
    ours = Blip2ForConditionalGeneration.from_blip2_config(theirs.config, use_fused=use_fused)
    ours.load_state_dict(theirs.state_dict())
    ours.eval()
    pixels = torch.randn(3, 3, SIDE, SIDE)
    ids, mask = pad(TEXTS, "right")
    their_ids, their_mask = behind_image_tokens(ids, mask)
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :2] = -100
    with torch.no_grad():
        expected = theirs(
            pixel_values=pixels,
            input_ids=their_ids,
            attention_mask=their_mask,
            labels=torch.cat([torch.full((3, QUERIES), -100), labels], dim=1),
        )
        logits = ours(ids, mask, pixel_values=pixels).logits
        loss = ours(ids, mask, labels, pixel_values=pixels).loss
    real = their_mask.bool()
    torch.testing.assert_close(logits[real], expected.logits[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_fused", [False, True])
def test_t5_logits_and_loss_equal_transformers(use_fused):
    theirs = transformers_blip2("t5")
    ours = Blip2ForConditionalGeneration.from_blip2_config(theirs.config, use_fused=use_fused)
    ours.load_state_dict(theirs.state_dict())
    ours.eval()
    pixels = torch.randn(3, 3, SIDE, SIDE)
    ids, mask = pad(TEXTS, "right")
    their_ids, their_mask = behind_image_tokens(ids, mask)
    labels, labels_mask = pad([[3, 9], [17, 20, 21, 1], [8]], "right")
    labels = labels.masked_fill(labels_mask == 0, -100)
    start = torch.cat([torch.zeros(3, 1, dtype=torch.int64), labels[:, :-1].clamp(min=0)], dim=1)
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=their_ids, attention_mask=their_mask, labels=labels)
        logits = ours(ids, mask, pixel_values=pixels, decoder_input_ids=start).logits
        loss = ours(ids, mask, labels, pixel_values=pixels).loss
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_generated_tokens_equal_transformers(name, use_fused, options):
    theirs = transformers_blip2(name)
    ours = Blip2ForConditionalGeneration.from_transformers(theirs, use_fused=use_fused)
    pixels = torch.randn(3, 3, SIDE, SIDE)
    ids = torch.tensor([[4, 9, 33], [5, 8, 2], [40, 41, 42]])
    their_ids, their_mask = behind_image_tokens(ids, torch.ones_like(ids))
    options = {**GREEDY, "max_new_tokens": 8, "eos_token_id": 59, **options}
    expected = theirs.generate(pixel_values=pixels, input_ids=their_ids, attention_mask=their_mask, **options)
    got = ours.generate(pixels, input_ids=ids, **options)
    prompt = 0 if name == "t5" else their_ids.shape[1]
    assert torch.equal(got.sequences, expected.sequences[:, prompt:])
    # The scores too: a model that repeats itself would give the same tokens for other images.
    assert_same_logits(got, expected)


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_no_prompt_starts_as_transformers(name, use_fused):
    theirs = transformers_blip2(name)
    ours = Blip2ForConditionalGeneration.from_transformers(theirs, use_fused=use_fused)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": 59}
    tokens = ours.generate(pixels, **options)
    if name == "opt":
        expected = theirs.generate(pixel_values=pixels, **options)[:, QUERIES + 1 :]
    else:  # transformers asks for a beginning-of-sequence token, which T5 has not
        ids = torch.full((2, QUERIES), IMAGE_TOKEN)
        expected = theirs.generate(pixel_values=pixels, input_ids=ids, **options)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("use_fused", [False, True])
def test_instructblip_equals_transformers(use_fused):
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**VISION),
        qformer_config=InstructBlipQFormerConfig(**QFORMER),
        text_config=copy.deepcopy(LANGUAGE["llama"]),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    theirs = spread(TransformersInstructBlip(config)).eval()
    ours = Blip2ForConditionalGeneration.from_blip2_config(config, use_fused=use_fused)
    ours.load_state_dict(theirs.state_dict())
    ours.eval()
    pixels = torch.randn(3, 3, SIDE, SIDE)
    ids, mask = pad(TEXTS, "right")
    their_ids, their_mask = behind_image_tokens(ids, mask)
    instruction, instruction_mask = pad([[3, 4, 5], [6], [7, 8, 9, 10]], "right")
    given = {"qformer_input_ids": instruction, "qformer_attention_mask": instruction_mask}
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, input_ids=their_ids, attention_mask=their_mask, **given).logits
        logits = ours(ids, mask, pixel_values=pixels, **given).logits
        other = ours(ids, mask, pixel_values=pixels, qformer_input_ids=instruction.flip(0)).logits
    real = their_mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=1e-4)
    assert not torch.allclose(logits, other, atol=1e-2), "the instruction must matter"
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": 59}
    whole = torch.tensor([[4, 9], [5, 8], [40, 41]])
    whole_theirs, _ = behind_image_tokens(whole, torch.ones_like(whole))
    expected = theirs.generate(pixel_values=pixels, input_ids=whole_theirs, **given, **options)
    tokens = ours.generate(pixels, input_ids=whole, **given, **options)
    assert torch.equal(tokens, expected[:, whole_theirs.shape[1] :])


def test_transformers_names_are_all_there():
    theirs = transformers_blip2("opt")
    ours = Blip2ForConditionalGeneration.from_blip2_config(theirs.config)
    state = theirs.state_dict()
    missing = dict(state)
    del (
        missing["vision_model.post_layernorm.bias"],
        missing["qformer.encoder.layer.0.attention.output.dense.weight"],
    )
    with pytest.raises(RuntimeError, match=r"(?s)ln_vision\.bias.*qformer\.encoder\.layer\.0\.attention"):
        ours.load_state_dict(missing)
    ours.load_state_dict(state)
    torch.testing.assert_close(ours.ln_vision.weight, theirs.vision_model.post_layernorm.weight)
    # Its own state dict comes back too, and leaves nothing out.
    again = Blip2ForConditionalGeneration.from_blip2_config(theirs.config)
    again.load_state_dict(ours.state_dict())
    pixels = torch.randn(1, 3, SIDE, SIDE)
    torch.testing.assert_close(
        again.eval().soft_prompt(pixels), ours.eval().soft_prompt(pixels), rtol=0, atol=0
    )


# --- the loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_logits", [supervised_rows.MAX_LOGITS, 3 * VOCABULARY], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", [*DECODER_ONLY, *ENCODER_DECODER])
def test_loss_on_supervised_rows_equals_the_models_own(name, max_logits, monkeypatch):
    plain = stage2(name)
    fused = copy.deepcopy(plain)
    fused.use_fused = True
    original, chosen = supervised_rows.supervised_row_loss, []

    def limited(run, head, rows, targets):
        chosen.append(rows.numel())
        return original(run, head, rows, targets, max_logits=max_logits)

    monkeypatch.setattr("blip2_kernels.model.generation.supervised_row_loss", limited)
    ids, mask = pad(TEXTS, "right")
    images = features()
    losses = []
    for model in (plain, fused):
        output = model(ids, mask, image_features=images, prompt_lengths=PROMPT_LENGTHS)
        output.loss.backward()
        losses.append(output.loss.detach())
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    # 4, 2 and 2 tokens lie behind the prompts.
    assert chosen == [8]
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (plain, fused)]
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for parameter, expected in gradients[0].items():
        scale = max(expected.abs().max(), 1e-6 * largest)
        error = (gradients[1][parameter] - expected).abs().max() / scale
        assert error < 1e-4 or expected.abs().max() < 1e-6 * largest, f"{parameter}: {error}"


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_fused_head_sees_supervised_rows_only(name):
    model = stage2(name, use_fused=True)
    ids, mask = pad(TEXTS, "right")
    seen = []
    head = model.language_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[:-1].numel()))
    output = model(ids, mask, image_features=features(), prompt_lengths=PROMPT_LENGTHS)
    assert seen == [8]
    assert output.logits is None
    model.use_fused = False
    output = model(ids, mask, image_features=features(), prompt_lengths=PROMPT_LENGTHS)
    assert seen[1] == (3 * (QUERIES + ids.shape[1]) if name == "opt" else 3 * 4)
    assert output.logits is not None
    handle.remove()
    assert not head._forward_pre_hooks


def test_loss_is_the_mean_over_the_answers_tokens():
    """Written out: each answer token's log-probability from the row before it, one sample at a time."""
    model = stage2("llama")
    ids, mask = pad(TEXTS, "right")
    images = features()
    with torch.no_grad():
        loss = model(ids, mask, image_features=images, prompt_lengths=PROMPT_LENGTHS).loss
        terms = []
        for text, image, prompt in zip(TEXTS, images, PROMPT_LENGTHS.tolist(), strict=True):
            soft = model.soft_prompt(image_features=image[None])
            words = model.language_model.get_input_embeddings()(torch.tensor([text]))
            logits = model.language_model(inputs_embeds=torch.cat([soft, words], dim=1)).logits[0]
            for place in range(prompt, len(text)):
                terms.append(-logits[QUERIES + place - 1].log_softmax(-1)[text[place]])
    assert len(terms) == 8
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=0, atol=1e-5)


def test_prefix_of_an_encoder_decoder_goes_to_its_encoder():
    model = stage2("t5")
    ids, mask = pad(TEXTS, "scattered")
    images = features()
    split = model(ids, mask, image_features=images, prompt_lengths=PROMPT_LENGTHS)
    prefix, prefix_mask = pad([[4, 9], [5], [40, 41, 42]], "right")
    answer, answer_mask = pad([[33, 7, 21, 50], [8, 2], [43, 17]], "right", length=4)
    labels = answer.masked_fill(answer_mask == 0, -100)
    by_hand = model(prefix, prefix_mask, labels, image_features=images)
    torch.testing.assert_close(split.loss, by_hand.loss, rtol=0, atol=1e-6)
    real = answer_mask.bool()
    torch.testing.assert_close(split.logits[real], by_hand.logits[real], rtol=0, atol=1e-5)
    # Without a prefix the encoder holds the soft prompt alone.
    none = model(None, None, labels, image_features=images)
    empty = model(torch.zeros(3, 0, dtype=torch.int64), None, labels, image_features=images)
    torch.testing.assert_close(none.loss, empty.loss, rtol=0, atol=0)
    assert not torch.allclose(none.loss, by_hand.loss, atol=1e-3)


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize("name", [*DECODER_ONLY, *ENCODER_DECODER])
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_padding_changes_nothing(name, side, use_fused):
    model = stage2(name, use_fused)
    images = features()
    alone = []
    with torch.no_grad():
        for text, image, prompt in zip(TEXTS, images, PROMPT_LENGTHS, strict=True):
            output = model(torch.tensor([text]), image_features=image[None], prompt_lengths=prompt[None])
            alone.append((output.loss, len(text) - prompt))
        ids, mask = pad(TEXTS, side)
        loss = model(ids, mask, image_features=images, prompt_lengths=PROMPT_LENGTHS).loss
    expected = sum(value * count for value, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "scattered"])
def test_logits_lie_where_the_text_was_given(side):
    # In fp64: a batch of one takes other matrix kernels than a batch of three, and how they round differs
    # from one processor to the next.
    model = stage2("llama").double()
    images = features().double()
    ids, mask = pad(TEXTS, side)
    with torch.no_grad():
        logits = model(ids, mask, image_features=images).logits
        labels = torch.where(mask == 1, ids, -100)
        also = model(ids, mask, labels, image_features=images).logits
        for row, text in enumerate(TEXTS):
            expected = model(torch.tensor([text]), image_features=images[row : row + 1]).logits[0]
            got = logits[row, QUERIES:][mask[row] == 1]
            torch.testing.assert_close(got, expected[QUERIES:], rtol=0, atol=1e-10)
    torch.testing.assert_close(also, logits, rtol=0, atol=1e-10)


def test_padding_is_never_supervised():
    model = stage2("opt")
    ids, mask = pad(TEXTS, "left")
    images = features()
    careless = model(ids, mask, ids, image_features=images).loss
    careful = model(ids, mask, ids.masked_fill(mask == 0, -100), image_features=images).loss
    torch.testing.assert_close(careless, careful, rtol=0, atol=0)


# --- generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize("name", [*DECODER_ONLY, *ENCODER_DECODER])
@pytest.mark.parametrize("side", ["right", "left", "scattered"])
def test_padded_prompts_generate_what_they_do_alone(name, side, use_fused):
    model = stage2(name, use_fused)
    images = features()
    options = {**GREEDY, "max_new_tokens": 7, "min_new_tokens": 7}
    texts = [[4, 9, 33, 7], [], [5, 8]]
    alone = [
        model.generate(
            image_features=image[None], input_ids=torch.tensor([text], dtype=torch.int64), **options
        )
        for text, image in zip(texts, images, strict=True)
    ]
    ids, mask = pad(texts, side)
    batch = model.generate(image_features=images, input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(batch.sequences, torch.cat([single.sequences for single in alone]))
    for row, single in enumerate(alone):
        assert_same_logits(batch, single, row)


def test_generate_passes_every_option_on():
    model = stage2("llama")
    images = features()
    options = {"max_new_tokens": 6, "pad_token_id": 1, "eos_token_id": 59}
    torch.manual_seed(7)
    sampled = model.generate(image_features=images, do_sample=True, temperature=3.0, top_k=40, **options)
    torch.manual_seed(7)
    again = model.generate(image_features=images, do_sample=True, temperature=3.0, top_k=40, **options)
    greedy = model.generate(image_features=images, do_sample=False, **options)
    assert torch.equal(sampled, again)
    assert not torch.equal(sampled, greedy)
    banned = model.generate(
        image_features=images, do_sample=False, suppress_tokens=greedy.unique().tolist(), **options
    )
    assert not set(banned.flatten().tolist()) & set(greedy.flatten().tolist())
    detailed = model.generate(
        image_features=images, do_sample=False, return_dict_in_generate=True, output_scores=True, **options
    )
    assert torch.equal(detailed.sequences, greedy)
    assert torch.equal(detailed.scores[0].argmax(-1), greedy[:, 0])
    with pytest.raises(ValueError, match="num_beamz"):
        model.generate(image_features=images, num_beamz=3)


def test_image_decides_what_is_generated_and_masked_tokens_do_not():
    model = stage2("llama")
    images = features()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": 59}
    tokens = model.generate(image_features=images, **options)
    assert not torch.equal(tokens[0], tokens[1])
    longer = torch.cat([images, 100 * torch.randn(3, 2, WIDTH)], dim=1)
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[:, 6:] = 0
    assert torch.equal(model.generate(image_features=longer, image_mask=mask, **options), tokens)


# --- frozen, dtypes, stage 1 ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_only_the_trained_parts_change(name, use_fused):
    model = Blip2ForConditionalGeneration.from_transformers(transformers_blip2(name), use_fused=use_fused)
    model.train()
    assert model.qformer.training
    assert not any(part.training for part in model.language_model.modules())
    assert not any(part.training for part in model.vision_model.modules())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if not n.startswith(FROZEN)}
    assert model.trainable_state_dict().keys() == trained
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    ids, mask = pad(TEXTS, "right")
    model(
        ids, mask, pixel_values=torch.randn(3, 3, SIDE, SIDE), prompt_lengths=PROMPT_LENGTHS
    ).loss.backward()
    optimizer.step()
    for parameter, value in model.named_parameters():
        moved = not torch.equal(value, before[parameter])
        assert moved == (parameter in trained), parameter
        assert (value.grad is not None) == (parameter in trained), parameter


def test_frozen_parts_draw_no_dropout_in_training():
    config = copy.deepcopy(LANGUAGE["opt"])
    config.dropout = 0.5
    model = Blip2ForConditionalGeneration(
        Blip2GenerationConfig(
            Blip2QFormerConfig(**QFORMER, hidden_dropout_prob=0, attention_probs_dropout_prob=0), QUERIES
        ),
        language_model=AutoModelForCausalLM.from_config(config).train(),
    ).train()
    ids, mask = pad(TEXTS, "right")
    images = features()
    first, second = (model(ids, mask, ids, image_features=images).loss for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bf16_language_model_behind_an_fp32_qformer(name, use_fused):
    model = stage2(name, use_fused)
    ids, mask = pad(TEXTS, "right")
    images = features()
    expected = model(ids, mask, image_features=images, prompt_lengths=PROMPT_LENGTHS).loss
    model.language_model.to(torch.bfloat16)
    output = model(ids, mask, image_features=images.to(torch.float16), prompt_lengths=PROMPT_LENGTHS)
    output.loss.backward()
    assert output.soft_prompt.dtype == torch.float32
    torch.testing.assert_close(output.loss.float(), expected, rtol=0.05, atol=0.05)
    gradient = model.language_projection.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.abs().max() > 0
    tokens = model.generate(image_features=images, max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert tokens.shape[0] == 3


def test_opt_with_embeddings_narrower_than_its_layers():
    config = copy.deepcopy(LANGUAGE["opt"])
    config.word_embed_proj_dim = 8
    model = Blip2ForConditionalGeneration(
        Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER), QUERIES),
        language_model=AutoModelForCausalLM.from_config(config),
        use_fused=True,
    )
    assert model.language_projection.out_features == 8
    ids, mask = pad(TEXTS, "right")
    assert torch.isfinite(model(ids, mask, ids, image_features=features()).loss)


def pretraining_config(**qformer):
    return Blip2PreTrainingConfig(
        Blip2QFormerConfig(**{**QFORMER, "vocab_size": 120, **qformer}, use_qformer_text_input=True),
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
    )


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_from_pretraining_takes_what_reads_images(name):
    encoder = FrozenVisionEncoder(Blip2VisionModel(Blip2VisionConfig(**VISION)))
    stage1 = spread(Blip2ForPreTraining(pretraining_config(), vision_model=encoder)).eval()
    stage1.ln_vision.eps = 3e-4
    model = Blip2ForConditionalGeneration.from_pretraining(stage1, language_model(name))
    assert model.vision_model is stage1.vision_model
    assert model.ln_vision.eps == 3e-4
    assert not any(".intermediate." in key for key in model.state_dict() if key.startswith("qformer"))
    pixels = torch.randn(2, 3, SIDE, SIDE)
    hidden = stage1.encode_image(pixel_values=pixels)
    expected = model.language_projection(hidden)
    torch.testing.assert_close(model.soft_prompt(pixels), expected, rtol=0, atol=1e-6)
    # Copied: training stage 2 leaves the stage-1 model alone.
    with torch.no_grad():
        model.query_tokens += 1
        model.qformer.layernorm.weight += 1
        model.ln_vision.bias += 1
    torch.testing.assert_close(stage1.encode_image(pixel_values=pixels), hidden, rtol=0, atol=0)
    assert stage1.config.qformer.use_qformer_text_input


def test_ln_vision_starts_where_the_image_encoder_brings_one():
    vision = Blip2VisionModel(Blip2VisionConfig(**VISION))
    nn.init.normal_(vision.post_layernorm.weight)
    config = Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER), QUERIES)
    model = Blip2ForConditionalGeneration(config, language_model=language_model("opt"), vision_model=vision)
    torch.testing.assert_close(model.ln_vision.weight, vision.post_layernorm.weight)
    assert model.ln_vision.weight is not vision.post_layernorm.weight
    assert model.ln_vision.weight.requires_grad


def test_config_round_trip():
    for qformer in (Blip2QFormerConfig(**QFORMER), InstructBlipQFormerConfig(**QFORMER)):
        config = Blip2GenerationConfig(qformer, 7, 1e-6)
        back = Blip2GenerationConfig.from_dict(config.to_dict())
        assert back.to_dict() == config.to_dict()
        assert type(back.qformer) is type(qformer)
        assert back.is_instruct == isinstance(qformer, InstructBlipQFormerConfig)


# --- bad input ------------------------------------------------------------------------------------------

IDS, MASK = torch.tensor([[4, 9, 33], [5, 8, 2]]), torch.ones(2, 3, dtype=torch.int64)
IMAGES = torch.zeros(2, 4, WIDTH)
LONG = torch.full((2, 41), 7)


def with_vision():
    return Blip2ForConditionalGeneration.from_transformers(transformers_blip2("opt"))


@pytest.mark.parametrize("use_fused", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("opt", dict(), ValueError, "image_features: expected image_features or pixel_values, got neither"),
        (
            "opt",
            dict(image_features=IMAGES, pixel_values=torch.zeros(2, 3, SIDE, SIDE)),
            ValueError,
            "image_features: expected image_features or pixel_values, got both",
        ),
        (
            "opt",
            dict(pixel_values=torch.zeros(2, 3, SIDE, SIDE)),
            ValueError,
            "pixel_values: expected image_features, since this model has no vision_model",
        ),
        (
            "opt",
            dict(image_features=torch.zeros(2, 4, 7)),
            ValueError,
            r"image_features: expected .*\[batch, tokens, 24\], got float32 \[2, 4, 7\]",
        ),
        ("opt", dict(image_features=IMAGES.long()), TypeError, "image_features: expected .* got int64"),
        (
            "opt",
            dict(image_features=IMAGES[:, :0]),
            ValueError,
            "image_features: expected at least one token of one image",
        ),
        (
            "opt",
            dict(image_features=IMAGES[:1]),
            ValueError,
            r"input_ids: expected int64 or int32 \[1, tokens\], got int64 \[2, 3\]",
        ),
        (
            "opt",
            dict(image_features=IMAGES, image_mask=torch.full((2, 4), 2)),
            ValueError,
            "^image_mask: expected only 0 and 1, got 2",
        ),
        (
            "opt",
            dict(image_features=IMAGES, attention_mask=MASK[:, :2]),
            ValueError,
            r"attention_mask: expected .*\[2, 3\], got int64 \[2, 2\]",
        ),
        (
            "opt",
            dict(image_features=IMAGES, attention_mask=3 * MASK),
            ValueError,
            "attention_mask: expected only 0 and 1, got 3",
        ),
        (
            "opt",
            dict(image_features=IMAGES, input_ids=IDS.float()),
            TypeError,
            r"input_ids: expected int64 or int32 \[2, tokens\], got float32",
        ),
        (
            "opt",
            dict(image_features=IMAGES, input_ids=IDS + VOCABULARY),
            ValueError,
            r"input_ids: expected values in \[0, 61\), got 94",
        ),
        (
            "opt",
            dict(image_features=IMAGES, input_ids=None, attention_mask=None),
            ValueError,
            r"input_ids: expected integers \[batch, tokens\], got None",
        ),
        (
            "opt",
            dict(image_features=IMAGES, input_ids=IDS[:, :0], attention_mask=None),
            ValueError,
            "input_ids: expected at least one token behind the soft prompt",
        ),
        (
            "opt",
            dict(image_features=IMAGES, input_ids=torch.ones(2, 36, dtype=torch.int64), attention_mask=None),
            ValueError,
            r"input_ids: expected at most 35 tokens behind a soft prompt of 5 .* holds 40\), got 36",
        ),
        (
            "opt",
            dict(image_features=IMAGES, labels=IDS[:, :2]),
            ValueError,
            r"labels: expected int64 or int32 \[2, 3\], got int64 \[2, 2\]",
        ),
        (
            "opt",
            dict(image_features=IMAGES, labels=IDS.float()),
            TypeError,
            "labels: expected int64 or int32",
        ),
        (
            "opt",
            dict(image_features=IMAGES, labels=IDS - 7),
            ValueError,
            r"labels: expected -100 or values in \[0, 61\), got -3",
        ),
        (
            "opt",
            dict(image_features=IMAGES, labels=torch.full_like(IDS, -100)),
            ValueError,
            "labels: expected at least one that is not -100, got none",
        ),
        (
            "opt",
            dict(image_features=IMAGES, attention_mask=0 * MASK, labels=IDS),
            ValueError,
            "labels: expected at least one that is not -100, got none",
        ),
        (
            "opt",
            dict(image_features=IMAGES, labels=IDS, prompt_lengths=torch.tensor([1, 1])),
            ValueError,
            "prompt_lengths: expected labels or prompt_lengths, got both",
        ),
        (
            "opt",
            dict(image_features=IMAGES, prompt_lengths=torch.tensor([1, 4])),
            ValueError,
            r"prompt_lengths: expected a value in \[0, 3\], the tokens of row 1, got 4",
        ),
        (
            "t5",
            dict(image_features=IMAGES, prompt_lengths=torch.tensor([1])),
            ValueError,
            r"prompt_lengths: expected int64 or int32 \[2\], got int64 \[1\]",
        ),
        (
            "opt",
            dict(image_features=IMAGES, decoder_input_ids=IDS),
            ValueError,
            "decoder_input_ids: expected None, since the language model is decoder-only",
        ),
        (
            "opt",
            dict(image_features=IMAGES, decoder_attention_mask=MASK),
            ValueError,
            "decoder_attention_mask: expected None, since the language model is decoder-only",
        ),
        (
            "opt",
            dict(image_features=IMAGES, qformer_input_ids=IDS),
            ValueError,
            "qformer_input_ids: expected None, since only a Q-Former with an InstructBlipQFormerConfig",
        ),
        (
            "opt",
            dict(image_features=IMAGES, qformer_attention_mask=MASK),
            ValueError,
            "qformer_attention_mask: expected qformer_input_ids beside it, got None",
        ),
        (
            "t5",
            dict(image_features=IMAGES),
            ValueError,
            "labels: expected labels, prompt_lengths or decoder_input_ids, since the language model is a",
        ),
        (
            "t5",
            dict(image_features=IMAGES, labels=torch.full((2, 4), -100)),
            ValueError,
            "labels: expected at least one that is not -100, got none",
        ),
        (
            "t5",
            dict(image_features=IMAGES, prompt_lengths=torch.tensor([3, 3])),
            ValueError,
            "labels: expected at least one that is not -100, got none",
        ),
        (
            "t5",
            dict(image_features=IMAGES, labels=IDS[:1]),
            ValueError,
            r"labels: expected int64 or int32 \[2, tokens\], got int64 \[1, 3\]",
        ),
        (
            "t5",
            dict(image_features=IMAGES, labels=IDS, decoder_attention_mask=MASK[:, :2]),
            ValueError,
            r"decoder_attention_mask: expected .*\[2, 3\], got int64 \[2, 2\]",
        ),
        (
            "bart",
            dict(image_features=IMAGES, labels=LONG),
            ValueError,
            r"^labels: expected at most 40 tokens for the decoder \(its position table\), got 41",
        ),
        (
            "bart",
            dict(image_features=IMAGES, decoder_input_ids=LONG),
            ValueError,
            r"^decoder_input_ids: expected at most 40 tokens for the decoder .*got 41",
        ),
        (
            "bart",
            dict(
                image_features=IMAGES,
                input_ids=LONG,
                attention_mask=None,
                prompt_lengths=torch.tensor([5, 0]),
            ),
            ValueError,
            r"^prompt_lengths: expected at most 40 tokens for the decoder .*got 41",
        ),
        (
            "t5",
            dict(image_features=IMAGES, decoder_input_ids=IDS + VOCABULARY),
            ValueError,
            r"^decoder_input_ids: expected values in \[0, 61\), got 94",
        ),
        (
            "t5",
            dict(image_features=IMAGES, labels=IDS, decoder_input_ids=IDS - 9),
            ValueError,
            r"^decoder_input_ids: expected values in \[0, 61\), got -7",
        ),
        (
            "opt",
            dict(image_features=IMAGES, image_mask=torch.ones(2, 5)),
            ValueError,
            r"^image_mask: expected .*\[2, 4\], got float32 \[2, 5\]",
        ),
    ],
)
def test_forward_refuses(name, arguments, error, message, use_fused):
    model = stage2(name, use_fused)
    with pytest.raises(error, match=message):
        model(**{"input_ids": IDS, "attention_mask": MASK, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(), ValueError, "image_features: expected image_features or pixel_values, got neither"),
        (
            dict(image_features=IMAGES, attention_mask=MASK),
            ValueError,
            "attention_mask: expected input_ids beside it, got None",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS[:1]),
            ValueError,
            r"input_ids: expected int64 or int32 \[2, tokens\]",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, inputs_embeds=torch.zeros(2, 3, 16)),
            TypeError,
            "inputs_embeds",
        ),
        (dict(image_features=IMAGES, input_ids=IDS, max_new_token=3), ValueError, "max_new_token"),
        (
            dict(image_features=IMAGES, input_ids=IDS, max_new_tokens=34),
            ValueError,
            r"^max_new_tokens: expected at most 33 behind 8 rows of soft prompt and text .*40\), got 34",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, generation_config=GenerationConfig(max_new_tokens=99)),
            ValueError,
            "^max_new_tokens: expected at most 33 behind 8 rows .* got 99",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, max_length=42),
            ValueError,
            "^max_length: expected at most 41 behind 8 rows .* got 42",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, num_beams=0),
            ValueError,
            "^num_beams: expected an int >= 1, got 0",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, top_p=0.9),
            ValueError,
            r"^top_p: expected None without do_sample=True, got float 0\.9",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, max_new_tokens=0),
            ValueError,
            "^max_new_tokens: expected an int >= 1, got 0",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, max_new_tokens="9"),
            TypeError,
            "^max_new_tokens: expected an int >= 1, got str '9'",
        ),
    ],
)
def test_generate_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        stage2("opt").generate(**arguments)


NAN = float("nan")
OPTIONS_OUT_OF_RANGE = {
    "temperature": (0.0, -1.0, NAN, "hot"),
    "top_p": (0.0, 1.5, NAN),
    "top_k": (-1, 1.5),
    "min_p": (-0.1, NAN),
    "repetition_penalty": (0.0, -1.0, NAN, "a"),
    "length_penalty": (NAN, "a"),
    "num_beams": (0, 2.5, True),
    "num_return_sequences": (0,),
    "max_new_tokens": (0, 2.5, NAN),
    "min_new_tokens": (-1,),
    "do_sample": ("yes", 1),
    "use_cache": (3,),
    "early_stopping": (7,),
    "eos_token_id": ("a", [1, "b"]),
    "generation_config": ({"max_new_tokens": 3}, 5),
    "streamer": (5, print),
    "logits_processor": (5, [5]),
    "stopping_criteria": (5,),
}


@pytest.mark.parametrize("name", OPTIONS_OUT_OF_RANGE)
def test_options_of_generate_are_named_before_anything_runs(name):
    sampling = {"do_sample": True} if name in ("temperature", "top_p", "top_k", "min_p") else {}
    for value in OPTIONS_OUT_OF_RANGE[name]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
            check_generate_options({**sampling, name: value})
    model = stage2("opt")
    model.qformer.forward = None  # a call that reaches it fails otherwise
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
        model.generate(image_features=IMAGES, **{**sampling, name: value})


def test_fields_of_a_generation_config_are_checked_as_options_are():
    config = GenerationConfig(do_sample=True)
    config.top_p = NAN
    with pytest.raises(ValueError, match=r"^generation_config\.top_p: expected .* <= 1, got nan"):
        check_generate_options({"generation_config": config})
    check_generate_options({"generation_config": GenerationConfig(do_sample=True), "temperature": 0.5})
    with pytest.raises(ValueError, match=r"^temperature: expected None without do_sample=True"):
        check_generate_options({"temperature": 0.5}, GenerationConfig())


def test_generate_fills_the_position_table_and_no_more():
    model = stage2("opt")
    options = dict(image_features=IMAGES, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert model.generate(input_ids=IDS, max_new_tokens=33, **options).shape == (2, 33)
    assert model.generate(input_ids=IDS, max_length=41, **options).shape == (2, 33)
    # Nobody said how many: transformers' 20, or what there is room for.
    assert model.generate(input_ids=IDS, **options).shape == (2, 20)
    assert model.generate(input_ids=IDS.repeat(1, 10), **options).shape == (2, 6)
    bart = stage2("bart")
    start = bart.generate(input_ids=IDS, max_new_tokens=40, **options)
    assert start.shape == (2, 41)
    with pytest.raises(ValueError, match=r"^max_new_tokens: expected at most 40 behind 1 rows .* got 41"):
        bart.generate(input_ids=IDS, max_new_tokens=41, **options)


@pytest.mark.parametrize("use_fused", [False, True])
def test_an_instruction_is_named_as_the_caller_names_it(use_fused):
    config = Blip2GenerationConfig(
        InstructBlipQFormerConfig(**{**QFORMER, "max_position_embeddings": 6}), QUERIES
    )
    model = Blip2ForConditionalGeneration(config, language_model=language_model("opt"), use_fused=use_fused)
    for ids, message in (
        (torch.ones(2, 7, dtype=torch.int64), r"at most 6 tokens \(max_position_embeddings\), got 7"),
        (IDS + config.qformer.vocab_size, r"values in \[0, "),
        (IDS[0], r"int64 or int32 \[2, tokens\]"),
    ):
        with pytest.raises(ValueError, match=rf"^qformer_input_ids: expected {message}"):
            model(IDS, image_features=IMAGES, qformer_input_ids=ids)


def test_pixels_of_the_wrong_rank_and_encoders_of_the_wrong_width():
    with pytest.raises(
        ValueError, match=r"pixel_values: expected .*\[batch, channels, 28, 28\], got float32 \[3, 28, 28\]"
    ):
        with_vision()(IDS, pixel_values=torch.zeros(3, SIDE, SIDE))
    config = Blip2GenerationConfig(Blip2QFormerConfig(**{**QFORMER, "encoder_hidden_size": 9}), QUERIES)
    vision = Blip2VisionModel(Blip2VisionConfig(**VISION))
    with pytest.raises(ValueError, match=r"vision_model: expected features of width 9 .*got 24"):
        Blip2ForConditionalGeneration(config, language_model=language_model("opt"), vision_model=vision)
    vision = FrozenVisionEncoder(nn.Conv2d(3, 24, 14, stride=14))
    model = Blip2ForConditionalGeneration(config, language_model=language_model("opt"), vision_model=vision)
    with pytest.raises(ValueError, match=r"features of vision_model: expected .*\[batch, tokens, 9\]"):
        model(IDS, pixel_values=torch.zeros(2, 3, SIDE, SIDE))


def test_constructors_refuse_what_is_of_another_stage_or_width():
    lm = language_model("opt")
    text = Blip2QFormerConfig(**QFORMER, use_qformer_text_input=True)
    with pytest.raises(ValueError, match=r"use_qformer_text_input: expected False.*from_pretraining"):
        Blip2GenerationConfig(text)
    with pytest.raises(ValueError, match=r"config: expected .* stage-2 model, got a Blip2PreTrainingConfig"):
        Blip2ForConditionalGeneration(pretraining_config(), language_model=lm)
    mixed = dataclasses.asdict(Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER))) | {"temperature": 0.07}
    with pytest.raises(ValueError, match=r"config: expected the fields of stage 2 .*got temperature"):
        Blip2GenerationConfig.from_dict(mixed)
    with pytest.raises(
        TypeError, match=r"qformer: expected a Blip2QFormerConfig or Instruct.*, got NoneType"
    ):
        Blip2GenerationConfig.from_dict({"num_query_tokens": 3})
    with pytest.raises(TypeError, match="config: expected a Blip2GenerationConfig"):
        Blip2ForConditionalGeneration(Blip2QFormerConfig(**QFORMER), language_model=lm)
    with pytest.raises(ValueError, match=r"num_query_tokens: expected an int in \[1, 1024\], got 0"):
        Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER), 0)
    with pytest.raises(ValueError, match=r"num_query_tokens: expected an int in \[1, 1024\], got 1025"):
        Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER), 1025)
    with pytest.raises(TypeError, match=r"^vision_model: expected an nn\.Module or None, got str 'vit'"):
        Blip2ForConditionalGeneration(
            Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER)), language_model=lm, vision_model="vit"
        )
    with pytest.raises(ValueError, match="vision_layer_norm_eps: expected a finite number > 0, got -1"):
        Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER), 4, -1)
    config = transformers_blip2("opt").config
    other = copy.deepcopy(LANGUAGE["llama"])
    other.hidden_size = 20
    with pytest.raises(ValueError, match=r"language_model: expected embeddings of width 16 .*, got 20"):
        Blip2ForConditionalGeneration.from_blip2_config(
            config, language_model=AutoModelForCausalLM.from_config(other)
        )
    with pytest.raises(TypeError, match="config: expected a Blip2Config or InstructBlipConfig"):
        Blip2ForConditionalGeneration.from_blip2_config(Blip2GenerationConfig(Blip2QFormerConfig(**QFORMER)))
    with pytest.raises(TypeError, match="model: expected a BLIP-2 or InstructBLIP model with config"):
        Blip2ForConditionalGeneration.from_transformers(nn.Linear(1, 1))


def test_from_pretraining_refuses_what_is_no_stage_1_model_or_cannot_generate():
    stage1 = Blip2ForPreTraining(pretraining_config())
    with pytest.raises(TypeError, match="stage1: expected a Blip2ForPreTraining, got Linear"):
        Blip2ForConditionalGeneration.from_pretraining(nn.Linear(1, 1), language_model("opt"))
    with pytest.raises(
        TypeError, match=r"language_model: expected a language model .* OPTModel without generate"
    ):
        Blip2ForConditionalGeneration.from_pretraining(stage1, OPTModel(LANGUAGE["opt"]))
    with pytest.raises(TypeError, match=r"language_model: expected a language model .* got str 'gpt2'"):
        Blip2ForConditionalGeneration.from_pretraining(stage1, "gpt2")
