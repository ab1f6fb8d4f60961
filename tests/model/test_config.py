"""Blip2PreTrainingConfig: what it fills in, writes, reads and refuses."""

import json

import pytest
from pretraining_cases import VOCABULARY, small_config
from torch import nn
from transformers import Blip2Config, Blip2QFormerConfig, InstructBlipQFormerConfig

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.generation_config import Blip2GenerationConfig
from blip2_kernels.model.qformer import LMHead, QFormerModel, TextEmbeddings
from blip2_kernels.model.qformer_init import copy_text_feed_forward_to_query, init_bert_weights

QFORMER = {"vocab_size": 30523, "use_qformer_text_input": True}


def test_defaults_are_those_of_the_paper():
    config = Blip2PreTrainingConfig(Blip2QFormerConfig(**QFORMER))
    assert (config.num_query_tokens, config.image_text_hidden_size, config.max_text_length) == (32, 256, 32)
    assert (config.temperature, config.label_smoothing, config.dec_token_id) == (0.07, 0.1, 30522)
    assert (config.lm_normalisation, config.itc_gradient) == ("rank", "local")


def test_json_gives_back_what_was_written():
    config = small_config(temperature=0.2, lm_normalisation="global")
    written = json.loads(json.dumps(config.to_dict()))
    assert Blip2PreTrainingConfig.from_dict(written) == config
    assert Blip2PreTrainingConfig.from_dict({**written, "temperature": 0.3}) != config


def test_a_transformers_config_gives_qformer_queries_and_width():
    source = Blip2Config(
        qformer_config={**QFORMER, "hidden_size": 48}, num_query_tokens=5, image_text_hidden_size=9
    )
    config = Blip2PreTrainingConfig.from_blip2_config(source, itc_gradient="full")
    assert (config.qformer.hidden_size, config.num_query_tokens, config.image_text_hidden_size) == (48, 5, 9)
    assert config.itc_gradient == "full"
    assert config.qformer is not source.qformer_config, (
        "a copy, so that later changes do not reach the source"
    )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"qformer": InstructBlipQFormerConfig()}, TypeError, "qformer: expected a Blip2QFormerConfig, got"),
        ({"qformer": Blip2QFormerConfig()}, ValueError, "qformer.use_qformer_text_input: expected True"),
        ({"num_query_tokens": 0}, ValueError, r"num_query_tokens: expected an int in \[1, 1024\], got 0"),
        ({"num_query_tokens": 1025}, ValueError, r"num_query_tokens: .* in \[1, 1024\], got 1025"),
        ({"max_text_length": 17}, ValueError, r"max_text_length: expected an int in \[2, 16\], got 17"),
        ({"sep_token_id": VOCABULARY}, ValueError, r"sep_token_id: .*\[0, 36\], got 37"),
        ({"sep_token_id": 1}, ValueError, r"expected distinct tokens, got \[0, 1, 1, 36\]"),
        ({"pad_token_id": 5}, ValueError, "pad_token_id: expected qformer's 0, got 5"),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number > 0, got 0"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"label_smoothing": "no"}, TypeError, "label_smoothing: expected a number"),
        ({"lm_normalisation": "token"}, ValueError, "lm_normalisation: expected one of 'rank', 'global'"),
        ({"itc_gradient": "none"}, ValueError, "itc_gradient: expected one of 'local', 'full', got 'none'"),
    ],
)
def test_fields_that_make_no_sense_are_named(fields, error, message):
    good = {name: getattr(small_config(), name) for name in ("qformer", "cls_token_id", "sep_token_id")}
    with pytest.raises(error, match=message):
        Blip2PreTrainingConfig(**{**good, "max_text_length": 8, **fields})


def test_mixed_stages_and_unknown_fields_are_refused():
    fields = small_config().to_dict()
    with pytest.raises(
        ValueError, match="fields of stage 1 only, got text_config, language_model of stage 2"
    ):
        Blip2PreTrainingConfig.from_dict({**fields, "text_config": {}, "language_model": "opt"})
    with pytest.raises(ValueError, match=r"expected fields among .*, got temprature"):
        Blip2PreTrainingConfig.from_dict({**fields, "temprature": 1})
    with pytest.raises(ValueError, match="expected an entry 'qformer'"):
        Blip2PreTrainingConfig.from_dict({"temperature": 1})
    with pytest.raises(TypeError, match="fields: expected a mapping"):
        Blip2PreTrainingConfig.from_dict([])
    with pytest.raises(ValueError, match="got the configuration of a stage-2 model"):
        Blip2PreTrainingConfig.from_blip2_config(Blip2Config())
    with pytest.raises(TypeError, match="config: expected a Blip2Config, got Blip2QFormerConfig"):
        Blip2PreTrainingConfig.from_blip2_config(Blip2QFormerConfig(**QFORMER))
    with pytest.raises(ValueError, match="got queries"):
        Blip2PreTrainingConfig.from_blip2_config(Blip2Config(qformer_config=QFORMER), queries=3)


@pytest.mark.parametrize("config_class", [Blip2PreTrainingConfig, Blip2GenerationConfig])
@pytest.mark.parametrize("fields", [{"hidden_size": "wide"}, {"vocab_size": float("nan")}])
def test_a_stored_q_former_with_fields_of_the_wrong_kind_is_refused(config_class, fields):
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"^qformer: expected fields of Blip2QFormerConfig: .*{name}"):
        config_class.from_dict({"qformer": fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "config.hidden_size: expected an int >= 1, got 0"),
        ({"num_hidden_layers": -1}, "config.num_hidden_layers: expected an int >= 1, got -1"),
        ({"encoder_hidden_size": -3}, "config.encoder_hidden_size: expected an int >= 1, got -3"),
        ({"layer_norm_eps": float("nan")}, "config.layer_norm_eps: expected a finite number >= 0, got nan"),
        ({"hidden_dropout_prob": 1.5}, "config.hidden_dropout_prob: expected a number in .*, got 1.5"),
        ({"attention_probs_dropout_prob": -1.0}, "config.attention_probs_dropout_prob: expected a number"),
    ],
)
def test_a_q_former_of_sizes_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        QFormerModel(Blip2QFormerConfig(**{**QFORMER, **fields}))


@pytest.mark.parametrize("part", [TextEmbeddings, LMHead])
def test_text_parts_refuse_what_is_no_config_or_has_no_words(part):
    with pytest.raises(TypeError, match=r"^config: expected Blip2QFormerConfig or Instruct.*, got dict"):
        part({})
    with pytest.raises(ValueError, match=r"^config\.vocab_size: expected an int >= 1, got 0"):
        part(Blip2QFormerConfig(vocab_size=0))


def test_initialisation_refuses_what_it_cannot_start():
    with pytest.raises(TypeError, match=r"^module: expected a torch\.nn\.Module, got int 5"):
        init_bert_weights(5)
    with pytest.raises(ValueError, match=r"^initializer_range: expected a finite number >= 0, got nan"):
        init_bert_weights(nn.Linear(1, 1), float("nan"))
    with pytest.raises(TypeError, match=r"^qformer: expected a QFormerModel, got Linear"):
        copy_text_feed_forward_to_query(nn.Linear(1, 1))
