"""Stage 2: against transformers, through a frozen language model, with any padding."""

import copy

import pytest
import torch
from generation_cases import (
    DECODER_ONLY,
    ENCODER_DECODER,
    FROZEN,
    GREEDY,
    IMAGE_TOKEN,
    LANGUAGE,
    PROMPT_LENGTHS,
    QFORMER,
    QUERIES,
    SIDE,
    TEXTS,
    VISION,
    VOCABULARY,
    WIDTH,
    assert_same_logits,
    behind_image_tokens,
    features,
    language_model,
    pad,
    pretraining_config,
    spread,
    stage2,
    transformers_blip2,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    InstructBlipConfig,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)
from transformers import InstructBlipForConditionalGeneration as TransformersInstructBlip

from blip2_kernels.model import supervised_rows
from blip2_kernels.model.generation import Blip2ForConditionalGeneration, Blip2GenerationConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.vision import FrozenVisionEncoder

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
