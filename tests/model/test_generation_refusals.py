"""Stage 2: what is refused, and what the error says."""

import copy
import dataclasses

import pytest
import torch
from generation_cases import (
    LANGUAGE,
    QFORMER,
    QUERIES,
    SIDE,
    VISION,
    VOCABULARY,
    WIDTH,
    language_model,
    pretraining_config,
    stage2,
    transformers_blip2,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationConfig,
    InstructBlipQFormerConfig,
    OPTModel,
)

from blip2_kernels.model.generate_options import check_generate_options
from blip2_kernels.model.generation import Blip2ForConditionalGeneration, Blip2GenerationConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.vision import FrozenVisionEncoder

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
        *(
            (
                {"image_features": IMAGES, "input_ids": IDS, name: value},
                TypeError,
                f"^{name}: expected image and prompt as named here, got ",
            )
            for name, value in (
                ("inputs", IDS),
                ("inputs_embeds", torch.zeros(2, 3, 16)),
                ("inputs_embeds", None),
                ("past_key_values", 5),
                ("encoder_outputs", (torch.zeros(2, 3, 16),)),
                ("position_ids", IDS),
            )
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, assistant_model=5),
            TypeError,
            "^assistant_model: expected None, since an assistant sees no image, got int 5",
        ),
        (
            dict(image_features=IMAGES, input_ids=IDS, max_length=8),
            ValueError,
            "^max_length: expected at least 9 behind 8 rows of prompt, got 8",
        ),
        (dict(image_features=IMAGES, input_ids=IDS, max_new_token=3), ValueError, "max_new_token"),
        (
            dict(image_features=IMAGES, input_ids=IDS, max_new_tokens=34),
            ValueError,
            r"^max_new_tokens: expected at most 33 behind 8 rows of prompt .*40\), got 34",
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
    with pytest.raises(ValueError, match=r"^min_new_tokens: expected at most max_new_tokens, 3, got 9"):
        check_generate_options({"generation_config": GenerationConfig(max_new_tokens=3), "min_new_tokens": 9})


def test_what_a_generation_config_leaves_open_is_the_models():
    sampling = GenerationConfig(do_sample=True, max_new_tokens=99)
    options = {"temperature": 0.5, "generation_config": GenerationConfig(num_beams=2)}
    check_generate_options(options, sampling)
    model = stage2("opt")
    model.language_model.generation_config.max_new_tokens = 99
    with pytest.raises(ValueError, match=r"^max_new_tokens: expected at most 33 behind 8 rows .* got 99"):
        model.generate(image_features=IMAGES, input_ids=IDS, generation_config=GenerationConfig(num_beams=2))


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
