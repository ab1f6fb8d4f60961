"""What a tensor of BLIP-2 is called in LAVIS, in transformers and here: one table, read in all directions.

A row holds the three names. `{n}` stands for a number, `{w}` for `weight` or `bias`, any other field for the
rest of a name; a field has the same text in every column. None: there is no place for such a tensor. It is
carried along under LAVIS's name in a file of its own, so that the way back has it.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Format = Literal["lavis", "transformers", "blip2_kernels"]
FORMATS: tuple[Format, ...] = ("lavis", "transformers", "blip2_kernels")


def as_format(name: str, value: str) -> Format:
    """The format that an argument of that name says.

    Raises:
        ValueError: there is none such.
    """
    for form in FORMATS:
        if value == form:
            return form
    raise ValueError(f"{name}: expected one of {', '.join(FORMATS)}, got {value!r}")


@dataclass(frozen=True)
class Kind:
    """Which of LAVIS's models a checkpoint belongs to.

    Attributes:
        language: LAVIS's word for the language model: "opt", "t5" or "llm"; None for stage 1.
        instruct: whether the Q-Former reads an instruction (InstructBLIP).
    """

    language: str | None = None
    instruct: bool = False

    def __str__(self) -> str:
        if self.language is None:
            return "stage 1"
        return f"{'InstructBLIP' if self.instruct else 'stage 2'} ({self.language})"


class Row(NamedTuple):
    """One tensor's names; `ours` is transformers' where nothing else is said."""

    lavis: str
    transformers: str | None
    blip2_kernels: str | None

    def column(self, form: Format) -> str | None:
        return getattr(self, form)


def _same(lavis: str, transformers: str) -> Row:
    return Row(lavis, transformers, transformers)


_BERT, _LAYER, _OURS = (
    "Qformer.bert.embeddings",
    "Qformer.bert.encoder.layer.{n}",
    "qformer.encoder.layer.{n}",
)
_BLOCK, _VIT = "visual_encoder.blocks.{n}", "vision_model.encoder.layers.{n}"

SHARED = (
    _same("query_tokens", "query_tokens"),
    Row("ln_vision.{w}", "vision_model.post_layernorm.{w}", "ln_vision.{w}"),
    _same("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    _same("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    _same("visual_encoder.patch_embed.proj.{w}", "vision_model.embeddings.patch_embedding.{w}"),
    _same(_BLOCK + ".norm{n2}.{w}", _VIT + ".layer_norm{n2}.{w}"),
    _same(_BLOCK + ".attn.qkv.weight", _VIT + ".self_attn.qkv.weight"),
    _same(_BLOCK + ".attn.proj.{w}", _VIT + ".self_attn.projection.{w}"),
    _same(_BLOCK + ".mlp.fc{n2}.{w}", _VIT + ".mlp.fc{n2}.{w}"),
    _same(_LAYER + ".{part}attention.self.{leaf}", _OURS + ".{part}attention.attention.{leaf}"),
    _same(_LAYER + ".{leaf}", _OURS + ".{leaf}"),
    Row(_BERT + ".position_ids", None, None),
)  # fmt: skip

STAGE1 = (
    _same("vision_proj.{w}", "vision_projection.{w}"),
    _same("text_proj.{w}", "text_projection.{w}"),
    _same("itm_head.{w}", "itm_head.{w}"),
    Row("temp", None, "temp"),
    # Tied to the word embeddings and to `bias`, and so not a second time in our model.
    Row("Qformer.cls.predictions.decoder.{w}", None, None),
    Row("Qformer.cls.{leaf}", None, "cls.{leaf}"),
)

BLIP2 = (
    _same(_BERT + ".LayerNorm.{w}", "qformer.layernorm.{w}"),
    _same(_BERT + ".{table}_embeddings.weight", "embeddings.{table}_embeddings.weight"),
)

INSTRUCTBLIP = (
    _same(_BERT + ".LayerNorm.{w}", "qformer.embeddings.layernorm.{w}"),
    _same(_BERT + ".{table}_embeddings.weight", "qformer.embeddings.{table}_embeddings.weight"),
)

LANGUAGE = (  # `LM` is opt, t5 or llm
    _same("LM_proj.{w}", "language_projection.{w}"),
    Row("LM_model.{leaf}.rotary_emb.inv_freq", None, None),  # a buffer that old Llamas saved
    _same("LM_model.{leaf}", "language_model.{leaf}"),
)

# The one place where tensors are not renamed but joined: LAVIS's keys have no bias.
Q_BIAS, V_BIAS = _BLOCK + ".attn.q_bias", _BLOCK + ".attn.v_bias"
QKV_BIAS = _VIT + ".self_attn.qkv.bias"

# What transformers does not save a second time: the name, and that of the tensor it is.
TIED = (
    ("language_model.lm_head.weight", "language_model.model.decoder.embed_tokens.weight"),
    ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("language_model.lm_head.weight", "language_model.shared.weight"),
    ("language_model.encoder.embed_tokens.weight", "language_model.shared.weight"),
    ("language_model.decoder.embed_tokens.weight", "language_model.shared.weight"),
)


@functools.cache
def rows(kind: Kind) -> tuple[Row, ...]:
    """The table of one kind; the first row that fits a name is the one that counts."""
    language = kind.language
    if language is None:
        return (*SHARED, *STAGE1, *BLIP2)
    own = tuple(Row(row.lavis.replace("LM", language), *row[1:]) for row in LANGUAGE)
    return (*SHARED, *(INSTRUCTBLIP if kind.instruct else BLIP2), *own)


def rename(name: str, kind: Kind, source: Format, target: Format) -> tuple[str, bool] | None:
    """What `target` calls a tensor of `source`.

    Returns:
        The name, and whether it has a place there (else it is LAVIS's name, to be carried along); None for a
        name that is in no row.
    """
    for row in rows(kind):
        pattern, new = row.column(source), row.column(target)
        fields = _fields(row.lavis if pattern is None else pattern, name)
        if fields is not None:
            return (row.lavis if new is None else new).format(**fields), new is not None
    return None


@dataclass(frozen=True)
class Renamed:
    """A state under the names of another format.

    Attributes:
        placed: what has a place there.
        carried: what has none, under LAVIS's names.
        names: each new name, and the old one or ones.
        problems: what could not be renamed, and why.
    """

    placed: dict[str, Tensor]
    carried: dict[str, Tensor]
    names: dict[str, str]
    problems: tuple[str, ...]


def rename_all(state: Mapping[str, Tensor], kind: Kind, source: Format, target: Format) -> Renamed:
    """Rename every tensor; values are shared, and only the biases of the image encoder are made anew."""
    placed: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    problems: list[str] = []
    for name, value in state.items():
        joined = _join_or_split(name, state, source, target)
        if joined is not None:
            if isinstance(joined, str):
                problems.append(joined)
                continue
            old, new = joined
            placed.update(new)
            names.update(dict.fromkeys(new, old))
            continue
        found = rename(name, kind, source, target)
        if found is None:
            problems.append(f"unexpected {name}")
            continue
        new_name, has_place = found
        (placed if has_place else carried)[new_name] = value
        names[new_name] = name
    return Renamed(placed, carried, names, tuple(problems))


def _join_or_split(
    name: str, state: Mapping[str, Tensor], source: Format, target: Format
) -> tuple[str, dict[str, Tensor]] | str | None:
    """(old names, new tensors) of a bias of the image encoder's attention; a problem; or None for others."""
    if source == "lavis":
        fields = _fields(Q_BIAS, name) or _fields(V_BIAS, name)
        if fields is None or target == "lavis":
            return None
        q_name, v_name = Q_BIAS.format(**fields), V_BIAS.format(**fields)
        q, v = state.get(q_name), state.get(v_name)
        if q is None or v is None or q.shape != v.shape:
            return f"{name}: expected {q_name} and {v_name} of one shape"
        return f"{q_name} + {v_name}", {QKV_BIAS.format(**fields): torch.cat([q, torch.zeros_like(q), v])}
    fields = _fields(QKV_BIAS, name)
    if fields is None:
        return None
    if target != "lavis":
        return name, {name: state[name]}
    if state[name].dim() != 1 or len(state[name]) % 3:
        return f"{name}: expected a bias of queries, keys and values, got {list(state[name].shape)}"
    q, k, v = state[name].chunk(3)
    if k.any():
        return f"{name}: expected zeros in its middle third, since LAVIS's keys have no bias"
    # Copies: what shares memory would be written as one.
    return name, {Q_BIAS.format(**fields): q.clone(), V_BIAS.format(**fields): v.clone()}


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    def group(match: re.Match[str]) -> str:
        field = match[1]
        text = r"\d+" if field.startswith("n") else "weight|bias" if field == "w" else ".*"
        return f"(?P<{field}>{text})"

    return re.compile(re.sub(r"\\{(\w+)\\}", group, re.escape(pattern)))


def _fields(pattern: str, name: str) -> dict[str, str] | None:
    match = _compiled(pattern).fullmatch(name)
    return None if match is None else match.groupdict()
