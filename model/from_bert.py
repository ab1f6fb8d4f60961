"""A Q-Former that starts from a BERT, as BLIP-2's from BERT-base (paper section 3.1)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2QFormerConfig

from blip2_kernels.checks import check_int, describe

from .base import Blip2Base
from .pretrained import check_model_folder, read_json

# BERT's name inside a layer → the Q-Former's; the query feed-forward network starts as the text one.
LAYER_NAMES = {
    "attention.self.query": ("attention.attention.query",),
    "attention.self.key": ("attention.attention.key",),
    "attention.self.value": ("attention.attention.value",),
    "attention.output.dense": ("attention.output.dense",),
    "attention.output.LayerNorm": ("attention.output.LayerNorm",),
    "intermediate.dense": ("intermediate.dense", "intermediate_query.dense"),
    "output.dense": ("output.dense", "output_query.dense"),
    "output.LayerNorm": ("output.LayerNorm", "output_query.LayerNorm"),
}
HEAD = "cls.predictions."
CONFIG_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "initializer_range",
    "layer_norm_eps",
)  # fmt: skip


def read_bert_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a BERT's folder.

    Raises:
        TypeError: no path.
        FileNotFoundError: no `config.json` there.
        ValueError: one that cannot be read, not a BERT's, or without a `vocab_size`.
    """
    fields = read_json("bert", check_model_folder("bert", folder) / "config.json")
    if fields.get("model_type") != "bert":
        raise ValueError(f"bert: expected a config of model_type 'bert', got {fields.get('model_type')!r}")
    check_int(f"bert: vocab_size in {folder}", fields.get("vocab_size"), 1)
    return fields


def qformer_config_from_bert(folder: str | Path, *, vocab_size: int, **overrides: Any) -> Blip2QFormerConfig:
    """Configuration of a Q-Former of a BERT's shape.

    Args:
        folder: a transformers model folder with the `config.json` of a BERT.
        vocab_size: of the Q-Former, [DEC] included.
        overrides: further fields, such as `encoder_hidden_size`.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `read_bert_config`; a vocabulary smaller than the BERT's.
    """
    check_int("vocab_size", vocab_size, 1)
    fields = read_bert_config(folder)
    if vocab_size < fields["vocab_size"]:
        raise ValueError(f"vocab_size: expected at least the BERT's {fields['vocab_size']}, got {vocab_size}")
    shape = {name: fields[name] for name in CONFIG_FIELDS if name in fields}
    return Blip2QFormerConfig(**{**shape, **overrides}, vocab_size=vocab_size, use_qformer_text_input=True)


def read_bert(folder: str | Path) -> dict[str, Tensor]:
    """Weights of a transformers BERT folder (safetensors, whole or in shards), by name without the prefix
    `bert.`.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: one that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"bert: expected a model folder with *.safetensors, got {folder}")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update({name.removeprefix("bert."): value for name, value in load_file(file).items()})
        except SafetensorError as error:
            raise ValueError(f"bert: {file} is damaged: {error}") from error
    return state


@torch.no_grad()
def start_from_bert(model: Blip2Base, state: Mapping[str, Tensor]) -> list[str]:
    """Puts a BERT's weights where BLIP-2 has them.

    Self-attention, LayerNorms, embeddings, the feed-forward network of the text and its copy for the queries,
    and the language-modelling head where both have one. A Q-Former knows no segments: segment 0, which is all
    BERT saw of a single text, is added to the positions. Tokens that BERT does not have ([DEC]) start as
    [CLS]. What is BLIP-2's own (cross-attention, queries, projections, matching head) stays as it is.

    Args:
        model: of the BERT's depth and width.
        state: by name without the prefix `bert.` (:func:`read_bert`).

    Returns:
        Names of the parameters that were set.

    Raises:
        TypeError: no stage-1 model.
        ValueError: names all weights that are missing or of another shape; the model is left as it was.
    """
    if not isinstance(model, Blip2Base):
        raise TypeError(f"model: expected a Blip2ForPreTraining, got {describe(model)}")
    own = dict(model.named_parameters())
    new: dict[str, Tensor | None] = {}
    words, positions = state.get("embeddings.word_embeddings.weight"), "embeddings.position_embeddings.weight"
    if words is not None:
        rows = own["embeddings.word_embeddings.weight"].shape[0]
        start = words[model.config.cls_token_id : model.config.cls_token_id + 1]
        new["embeddings.word_embeddings.weight"] = torch.cat([words, *[start] * (rows - words.shape[0])])
    else:
        new["embeddings.word_embeddings.weight"] = None
    segments = state.get("embeddings.token_type_embeddings.weight")
    table = state.get(positions)
    new[positions] = table if table is None or segments is None else table + segments[0]
    for kind in ("weight", "bias"):
        new[f"qformer.layernorm.{kind}"] = state.get(f"embeddings.LayerNorm.{kind}")
        for layer in range(model.config.qformer.num_hidden_layers):
            for source, targets in LAYER_NAMES.items():
                value = state.get(f"encoder.layer.{layer}.{source}.{kind}")
                new.update({f"qformer.encoder.layer.{layer}.{target}.{kind}": value for target in targets})
    if f"{HEAD}transform.dense.weight" in state:
        for part in ("transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight",
                     "transform.LayerNorm.bias"):  # fmt: skip
            if HEAD + part in own:
                new[HEAD + part] = state.get(HEAD + part)
    problems = [f"missing {name}" for name, value in new.items() if value is None]
    problems += [
        f"{name}: expected {list(own[name].shape)}, got {list(value.shape)}"
        for name, value in new.items()
        if value is not None and own[name].shape != value.shape
    ]
    if problems:
        raise ValueError("bert: does not fit this model: " + "; ".join(problems))
    for name, value in new.items():
        if value is not None:
            own[name].copy_(value)
    return sorted(new)
