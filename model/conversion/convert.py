"""From one container to another: what would be done (`plan_conversion`), and doing it (`convert`)."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from ..checkpoints import CONFIG, CheckpointError, all_finite
from . import containers
from .configs import (
    config_from_json,
    config_from_shapes,
    kind_of,
    model_class,
    model_on_meta,
    set_tying,
)
from .containers import Stored
from .names import TIED, Format, Kind, Renamed, as_format, rename_all

PARTS = ("vision_model.", "language_model.")
"""What LAVIS leaves out of the files of its training, since it is frozen."""
_LN_VISION = "vision_model.post_layernorm."
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What a conversion does, and what is in its way.

    Attributes:
        kind: which of LAVIS's models it is.
        renames: each name in the target, and the name or names in the source.
        carried: what the target's format has no place for, kept in a file of its own, by LAVIS's names.
        left_out: what the files of `vision` and `language_model` hold beyond the model.
        absent: parts that neither source nor target has: `vision_model`, `language_model`.
        problems: names that are missing or unexpected, and shapes that clash; none, and it can be done.
    """

    kind: Kind
    renames: dict[str, str]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    absent: tuple[str, ...]
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a reader, one fact a line."""
        lines = [f"{self.kind}: {len(self.renames)} tensors"]
        lines += [f"  {old} -> {new}" for new, old in self.renames.items()]
        for title, names in (
            ("carried in a file of its own", self.carried),
            ("left out", self.left_out),
            ("not in the source, and not in the target", self.absent),
            ("in the way", self.problems),
        ):
            if names:
                lines.append(f"{title}: {len(names)}")
                lines += [f"  {name}" for name in names]
        return lines


@dataclass(frozen=True)
class Conversion:
    """A plan and the tensors it is about.

    Attributes:
        plan: what is done.
        source: every tensor under the source's names (LAVIS's, for an image encoder of its own file).
        canonical: every tensor under transformers' names, carried ones under LAVIS's; mapped, not loaded.
        target: the same as the target holds them.
        source_format, target_format: of both.
    """

    plan: Plan
    source: dict[str, Tensor]
    canonical: dict[str, Tensor]
    target: Stored
    source_format: Format
    target_format: Format

    def refuse_problems(self) -> None:
        """Raises CheckpointError with all that is in the way, if anything is."""
        if problems := self.plan.problems:
            raise CheckpointError(f"source: {len(problems)} in the way: {'; '.join(problems)}")


def plan_conversion(
    source: Path,
    source_format: str,
    target_format: str,
    *,
    config: Path | None = None,
    vision: Path | None = None,
    language_model: Path | None = None,
) -> Conversion:
    """Read a checkpoint and say what becomes of it; nothing is written.

    Args:
        source: LAVIS's file, transformers' folder, or a folder that `convert` made.
        source_format, target_format: "lavis", "transformers" or "blip2_kernels".
        config: `config.json` of a transformers BLIP-2 or InstructBLIP (or its folder), where the source has
            none and its shapes do not tell it.
        vision: file of the image encoder that LAVIS's training files leave out (`eva_vit_g.pth`).
        language_model: transformers' folder of the language model that they leave out.

    Raises:
        FileNotFoundError, CheckpointError: a file that is not there, damaged, or of another kind.
        ValueError: formats that do not exist, a part that the source has itself.
    """
    source_format = as_format("source_format", source_format)
    target_format = as_format("target_format", target_format)
    stored = containers.read(source, source_format)
    kind = kind_of(stored.state, stored.config, source_format)
    first = rename_all(stored.state | stored.carried, kind, source_format, "transformers")
    state, names, problems = first.placed, first.names, list(first.problems)
    parts, encoder, unread = _read_parts(state, kind, vision, language_model)
    state.update(parts.placed)
    names.update(parts.names)
    settings = _settings(kind, stored, state, config)
    if language_model is not None:
        settings.text_config = AutoConfig.from_pretrained(language_model)
    set_tying(settings, state)
    model = model_on_meta(kind, settings)
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name, kept in TIED:
        if name in wanted and kept in state and settings.text_config.tie_word_embeddings:
            state.setdefault(name, state[kept])
    # The files of parts may hold more than BLIP-2 reads: a classifier, EVA-CLIP's last block.
    for name in [name for name in parts.placed if name not in wanted]:
        del state[name]
        unread.append(names[name])
    absent = tuple(part for part in PARTS if not _has(state, part) and _has(wanted, part))
    problems += _misfits(state, wanted, absent, target_format)
    problems += _carried_misfits(first.carried, settings.qformer_config)
    known = {name: value for name, value in state.items() if name in wanted}
    second = rename_all(known | first.carried, kind, "transformers", target_format)
    plan = Plan(
        kind,
        {new: names.get(old, old) for new, old in second.names.items() if new in second.placed},
        tuple(second.carried),
        tuple(unread),
        tuple(part.rstrip(".") for part in absent),
        (*problems, *second.problems),
    )
    fields = json.loads(settings.to_json_string(use_diff=False)) | {
        "architectures": [model_class(kind).__name__]
    }
    return Conversion(
        plan,
        stored.state | encoder,
        state | first.carried,
        Stored(second.placed, second.carried, fields),
        source_format,
        target_format,
    )


def convert(conversion: Conversion, target: Path, *, progress: Progress | None = None) -> None:
    """Write what `plan_conversion` found to `target`, which is there whole afterwards or as it was.

    Args:
        conversion: the plan and its tensors.
        target: a file (LAVIS) or folder; one that is there is replaced.
        progress: called with what is done ("check", "write"), and bytes done and in all.

    Raises:
        CheckpointError: something in the plan's way, or weights that are NaN or infinite; all are named.
        OSError: the disk is full or cannot be written.
    """
    conversion.refuse_problems()
    plan = conversion.plan
    tell = progress or (lambda step, done, total: None)
    tensors = conversion.target.state | conversion.target.carried
    total, done, bad = sum(value.nbytes for value in tensors.values()), 0, []
    for name, value in tensors.items():
        if not all_finite(value):
            bad.append(plan.renames.get(name, name))
        done += value.nbytes
        tell("check", done, total)
    if bad:
        raise CheckpointError(f"source: expected finite weights, got NaN or infinity in {', '.join(bad)}")
    containers.WRITERS[conversion.target_format](
        target, conversion.target, lambda written: tell("write", min(written, total), total)
    )


def _read_parts(
    state: Mapping[str, Tensor], kind: Kind, vision: Path | None, language_model: Path | None
) -> tuple[Renamed, dict[str, Tensor], list[str]]:
    """What the files of frozen parts hold, the encoder's also under LAVIS's names, and names of neither."""
    encoder: dict[str, Tensor] = {}
    placed: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unread: list[str] = []
    for option, path, part in zip(("vision", "language_model"), (vision, language_model), PARTS, strict=True):
        if path is None:
            continue
        if _has(state, part):
            raise ValueError(f"{option}: expected a source without {part}*, got one that has it")
        if not path.exists():
            raise FileNotFoundError(f"{option}: expected a checkpoint, got {path}, which does not exist")
        if option == "vision":
            encoder = {f"visual_encoder.{n}": value for n, value in containers.read_lavis(path).state.items()}
            found = rename_all(encoder, kind, "lavis", "transformers")
            placed.update(found.placed)
            names.update(found.names)
            unread += [problem.removeprefix("unexpected ") for problem in found.problems]
        else:
            for name, value in containers.read_transformers(path).state.items():
                placed[part + name] = value
                names[part + name] = name
    return Renamed(placed, {}, names, ()), encoder, unread


def _settings(kind: Kind, stored: Stored, state: Mapping[str, Tensor], config: Path | None) -> Any:
    if config is not None:
        path = config / CONFIG if config.is_dir() else config
        if not path.is_file():
            raise FileNotFoundError(f"config: expected a config.json or its folder, got {config}")
        return config_from_json(kind, containers.read_json(path))
    return config_from_shapes(kind, state) if stored.config is None else config_from_json(kind, stored.config)


def _has(state: Iterable[str], part: str) -> bool:
    return any(name.startswith(part) and not name.startswith(_LN_VISION) for name in state)


def _misfits(
    state: Mapping[str, Tensor], wanted: Mapping[str, list[int]], absent: tuple[str, ...], target: Format
) -> list[str]:
    """Names and shapes that transformers' model has otherwise."""
    problems = [f"unexpected {name}" for name in state if name not in wanted]
    if target == "transformers":
        option = {"vision_model.": "--vision", "language_model.": "--language-model"}
        problems += [f"missing {part}* (name its files with {option[part]})" for part in absent]
    for name, shape in wanted.items():
        if name in state:
            if list(state[name].shape) != shape:
                problems.append(f"{name}: expected {shape}, got {list(state[name].shape)}")
        elif not name.startswith(absent) or name.startswith(_LN_VISION):
            problems.append(f"missing {name}")
    return problems


def _carried_misfits(carried: Mapping[str, Tensor], qformer: Any) -> list[str]:
    """Shapes of the language-modelling head and the temperature, which transformers' model does not have."""
    width, words, head = qformer.hidden_size, getattr(qformer, "vocab_size", 0), "Qformer.cls.predictions."
    wanted = {
        "temp": [],
        f"{head}bias": [words],
        f"{head}decoder.weight": [words, width],
        f"{head}decoder.bias": [words],
        f"{head}transform.dense.weight": [width, width],
        f"{head}transform.dense.bias": [width],
        f"{head}transform.LayerNorm.weight": [width],
        f"{head}transform.LayerNorm.bias": [width],
    }
    problems = []
    for name, value in carried.items():
        if name in wanted and list(value.shape) != wanted[name]:
            problems.append(f"{name}: expected {wanted[name]}, got {list(value.shape)}")
        if name.startswith("Qformer.cls.") and name not in wanted:
            problems.append(f"unexpected {name}")
    return problems
