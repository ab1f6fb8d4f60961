"""How the model of a checkpoint is built: its kind, and the configuration that its shapes tell."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2VisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
)

from ..checkpoints import CheckpointError
from .names import Format, Kind

LANGUAGES = {
    "opt": "opt",
    "t5": "t5",
    "llama": "llm",
}  # transformers' model_type, LAVIS's word; others: "llm"
EVA_VIT_G = Blip2VisionConfig()
"""The one image encoder that LAVIS trained with: 39 of its 40 blocks, 16 heads."""
OPT_HEADS = {768: 12, 2048: 32, 2560: 32, 4096: 32, 5120: 40}  # by hidden size
FREE_TOKENS = {"opt": 50265, "t5": 32100}
"""The first row of the vocabulary without a word, which transformers' processor takes for its image token."""
BERT_HEAD_DIM, LLAMA_HEAD_DIM = 64, 128

_INSTRUCT_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"


def kind_of(state: Mapping[str, Tensor], config: Mapping[str, Any] | None, form: Format) -> Kind:
    """Which of LAVIS's models a state belongs to.

    Raises:
        CheckpointError: none of them.
    """
    if config is not None:
        model_type = config.get("model_type")
        if model_type not in ("blip-2", "instructblip"):
            raise CheckpointError(
                f"source: expected a configuration of blip-2 or instructblip, got model_type {model_type!r}"
            )
        if "itm_head.weight" in state:
            return Kind()
        text = (config.get("text_config") or {}).get("model_type", "opt")
        return Kind(LANGUAGES.get(text, "llm"), model_type == "instructblip")
    if form != "lavis":
        raise CheckpointError("source: expected a configuration beside the weights, got none")
    if "query_tokens" not in state or not any(name.startswith("Qformer.bert.") for name in state):
        raise CheckpointError(
            "source: expected a checkpoint of LAVIS's BLIP-2 (query_tokens, Qformer.bert.*), got "
            f"{', '.join(list(state)[:3]) or 'nothing'}, …"
        )
    if "itm_head.weight" in state:
        return Kind()
    for language in ("opt", "t5", "llm"):
        if f"{language}_proj.weight" in state:
            return Kind(language, _INSTRUCT_WORDS in state)
    raise CheckpointError("source: expected itm_head, opt_proj, t5_proj or llm_proj in it, got none of them")


def model_class(kind: Kind) -> type[PreTrainedModel]:
    """transformers' class for a kind."""
    if kind.language is None:
        return Blip2ForImageTextRetrieval
    return InstructBlipForConditionalGeneration if kind.instruct else Blip2ForConditionalGeneration


def config_from_json(kind: Kind, fields: Mapping[str, Any]) -> Blip2Config | InstructBlipConfig:
    cls = InstructBlipConfig if kind.instruct else Blip2Config
    return cls.from_dict(dict(fields))


def config_from_shapes(kind: Kind, state: Mapping[str, Tensor]) -> Blip2Config | InstructBlipConfig:
    """The configuration that the shapes of a state (transformers' names) tell.

    What shapes do not tell, such as the number of heads, is that of the models LAVIS has.

    Args:
        kind: of the state.
        state: tensors by transformers' names. An image encoder that is not among them is EVA-CLIP ViT-g; of
            a language model only the width is known then.

    Raises:
        CheckpointError: shapes of no model that LAVIS has; a configuration has to be given then.
    """
    cls = InstructBlipConfig if kind.instruct else Blip2Config
    text: Mapping[str, Any] = {"model_type": "opt"}
    if kind.language is not None:
        text = _text_fields(kind, state)
    config = cls(
        vision_config=_vision_fields(state),
        qformer_config=_qformer_fields(kind, state),
        text_config=dict(text),
        num_query_tokens=_shape(state, "query_tokens")[1],
    )
    free = FREE_TOKENS.get(kind.language or "")
    if free is not None and free < config.text_config.vocab_size:
        config.image_token_index = free
    if kind.language is None:
        config.image_text_hidden_size = _shape(state, "vision_projection.weight")[0]
    return config


def set_tying(config: Any, state: Mapping[str, Tensor]) -> None:
    """Say of OPT's output layer what its values say: tied to the word embeddings or not."""
    head = state.get("language_model.lm_head.weight")
    words = state.get("language_model.model.decoder.embed_tokens.weight")
    if head is not None and words is not None:
        tied = head.data_ptr() == words.data_ptr() or torch.equal(head, words)
        config.text_config.tie_word_embeddings = tied


def model_on_meta(kind: Kind, config: Any) -> Any:
    """transformers' model of a kind, for its classes, names and shapes: nothing is allocated.

    Raises:
        CheckpointError: a configuration that contradicts itself.
    """
    try:
        with torch.device("meta"):
            return model_class(kind)(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"config: expected one that a model can be built from: {error}") from error


def _vision_fields(state: Mapping[str, Tensor]) -> dict[str, Any]:
    front = "vision_model.embeddings."
    layer = "qformer.encoder.layer.0.crossattention.attention.key.weight"
    if front + "class_embedding" not in state:
        if _shape(state, layer)[1] != EVA_VIT_G.hidden_size:
            raise _unknown("the image encoder, which is not in the checkpoint")
        return EVA_VIT_G.to_dict()
    width = _shape(state, front + "class_embedding")[-1]
    patch = _shape(state, front + "patch_embedding.weight")[-1]
    if width != EVA_VIT_G.hidden_size:
        raise _unknown(f"an image encoder of width {width}")
    return {
        "hidden_size": width,
        "num_attention_heads": EVA_VIT_G.num_attention_heads,
        "num_hidden_layers": min(_count(state, "vision_model.encoder.layers."), EVA_VIT_G.num_hidden_layers),
        "intermediate_size": _shape(state, "vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        "patch_size": patch,
        "image_size": math.isqrt(_shape(state, front + "position_embedding")[1] - 1) * patch,
    }


def _qformer_fields(kind: Kind, state: Mapping[str, Tensor]) -> dict[str, Any]:
    front = "qformer.encoder.layer."
    width, image_width = _shape(state, front + "0.crossattention.attention.key.weight")
    if width % BERT_HEAD_DIM:
        raise _unknown(f"a Q-Former of width {width}")
    fields: dict[str, Any] = {
        "hidden_size": width,
        "encoder_hidden_size": image_width,
        "num_attention_heads": width // BERT_HEAD_DIM,
        "num_hidden_layers": _count(state, front),
        "intermediate_size": _shape(state, front + "0.intermediate_query.dense.weight")[0],
    }
    reading = [int(name.removeprefix(front).split(".")[0]) for name in state if ".crossattention." in name]
    if later := [layer for layer in reading if layer > 0]:
        fields["cross_attention_frequency"] = min(later)
    tables = "qformer.embeddings." if kind.instruct else "embeddings."
    if tables + "word_embeddings.weight" in state:
        fields["vocab_size"] = _shape(state, tables + "word_embeddings.weight")[0]
        fields["max_position_embeddings"] = _shape(state, tables + "position_embeddings.weight")[0]
    if kind.language is None:
        fields["use_qformer_text_input"] = True
    return fields


def _text_fields(kind: Kind, state: Mapping[str, Tensor]) -> dict[str, Any]:
    front = "language_model."
    if not any(name.startswith(front) for name in state):
        width = _shape(state, "language_projection.weight")[0]
        model_type = next(name for name, word in LANGUAGES.items() if word == kind.language)
        if kind.language == "t5":
            return {"model_type": model_type, "d_model": width}
        # A stand-in that can be built: nothing else is known of it, and nothing of it is used.
        return {
            "model_type": model_type,
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        }
    if kind.language == "opt":
        words = _shape(state, front + "model.decoder.embed_tokens.weight")
        hidden = _shape(state, front + "model.decoder.layers.0.self_attn.q_proj.weight")[0]
        if hidden not in OPT_HEADS:
            raise _unknown(f"an OPT of width {hidden}")
        return {
            "model_type": "opt",
            "vocab_size": words[0],
            "word_embed_proj_dim": words[1],
            "hidden_size": hidden,
            "num_attention_heads": OPT_HEADS[hidden],
            "num_hidden_layers": _count(state, front + "model.decoder.layers."),
            "ffn_dim": _shape(state, front + "model.decoder.layers.0.fc1.weight")[0],
            # OPT keeps two rows in front of its table.
            "max_position_embeddings": _shape(state, front + "model.decoder.embed_positions.weight")[0] - 2,
        }
    if kind.language == "t5":
        block = front + "encoder.block.0.layer."
        buckets, heads = _shape(state, block + "0.SelfAttention.relative_attention_bias.weight")
        vocabulary, width = _shape(state, front + "shared.weight")
        return {
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": width,
            "num_heads": heads,
            "d_kv": _shape(state, block + "0.SelfAttention.q.weight")[0] // heads,
            "relative_attention_num_buckets": buckets,
            "d_ff": _shape(state, block + "1.DenseReluDense.wo.weight")[1],
            "feed_forward_proj": "gated-gelu" if block + "1.DenseReluDense.wi_0.weight" in state else "relu",
            "num_layers": _count(state, front + "encoder.block."),
            "num_decoder_layers": _count(state, front + "decoder.block."),
            "tie_word_embeddings": front + "lm_head.weight" not in state,
            "decoder_start_token_id": 0,
        }
    layer = front + "model.layers.0."
    vocabulary, width = _shape(state, front + "model.embed_tokens.weight")
    if width % LLAMA_HEAD_DIM:
        raise _unknown(f"a Llama of width {width}")
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": width // LLAMA_HEAD_DIM,
        "num_key_value_heads": _shape(state, layer + "self_attn.k_proj.weight")[0] // LLAMA_HEAD_DIM,
        "num_hidden_layers": _count(state, front + "model.layers."),
        "intermediate_size": _shape(state, layer + "mlp.gate_proj.weight")[0],
        "tie_word_embeddings": front + "lm_head.weight" not in state,
    }


def _shape(state: Mapping[str, Tensor], name: str) -> list[int]:
    if name not in state:
        raise CheckpointError(f"source: missing {name}")
    return list(state[name].shape)


def _count(state: Mapping[str, Tensor], front: str) -> int:
    return 1 + max(
        (int(name.removeprefix(front).split(".")[0]) for name in state if name.startswith(front)), default=-1
    )


def _unknown(what: str) -> CheckpointError:
    return CheckpointError(
        f"config: expected one (--config), since the shapes do not tell that of {what}, got None"
    )
