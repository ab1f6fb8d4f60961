"""The three containers of a BLIP-2 checkpoint: LAVIS's file, transformers' folder and ours.

Tensors are read memory-mapped, so what is open takes no memory of its own, and written from there: a
checkpoint may be larger than the memory of the machine.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from ..atomic import beside, replaced_file, replaced_folder, write_bytes, write_tensors
from ..checkpoints import CONFIG, MANIFEST, Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from .names import TIED, Format

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CARRIED = "blip2_kernels.safetensors"
"""In a transformers folder: what transformers has no place for, under LAVIS's names."""
SHARD_BYTES = 5 * 2**30
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Stored:
    """What a container holds.

    Attributes:
        state: tensors under the container's names.
        carried: tensors that have no place in its format, under LAVIS's names.
        config: transformers' configuration of the whole model, as JSON; None where the container has none.
    """

    state: dict[str, Tensor]
    carried: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] | None = None


def read(path: Path, form: Format) -> Stored:
    """Read a container; its tensors are mapped, not loaded.

    Raises:
        FileNotFoundError: there is nothing of that name.
        CheckpointError: a container of another format, or a damaged one.
    """
    if not path.exists() and not beside(path, "previous").exists():
        raise FileNotFoundError(f"source: expected a checkpoint, got {path}, which does not exist")
    return {"lavis": read_lavis, "transformers": read_transformers, "blip2_kernels": read_ours}[form](path)


def guess_format(path: Path) -> Format:
    """The format that a path has by its looks."""
    if path.is_file():
        return "lavis"
    return "blip2_kernels" if (path / MANIFEST).is_file() else "transformers"


# --- LAVIS: a file of torch.save, {"model": state dict, ...} ---


def read_lavis(path: Path) -> Stored:
    """Nothing but tensors and plain values is ever unpickled: a file that asks for more is refused."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file of LAVIS, got a folder")
    # What torch saved before 1.6 is no zip file and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if not mapped else "its pickle holds more than tensors"
        raise CheckpointError(f"{path}: refused or damaged, and nothing in it was run: {reason}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged file: {error}") from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict under 'model', got {type(state).__name__}")
    return Stored({str(name): value for name, value in state.items()})


def write_lavis(path: Path, stored: Stored, progress: Callable[[int], None]) -> None:
    """Configurations have no place in such a file."""
    with replaced_file(path) as partial, open(partial, "wb") as file:
        torch.save({"model": stored.state | stored.carried}, _Counted(file, progress))


class _Counted:
    """A file that tells how many bytes went into it."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._file, self._progress = file, progress

    def write(self, content: Any) -> int:
        written = self._file.write(content)
        self._progress(self._file.tell())
        return written

    def flush(self) -> None:
        self._file.flush()


# --- transformers: a folder of safetensors files and config.json ---


def read_transformers(path: Path) -> Stored:
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path}: expected a folder of transformers with {CONFIG}, got none")
    config = read_json(path / CONFIG)
    state: dict[str, Tensor] = {}
    for name, names in _shards(path).items():
        found = _safetensors(path / name)
        lost = sorted(set(names) - set(found))
        if lost:
            raise CheckpointError(f"{path / name}: expected {', '.join(lost)}, got none of that name")
        state.update(found)
    carried = _safetensors(path / CARRIED) if (path / CARRIED).is_file() else {}
    return Stored(state, carried, config)


def write_transformers(path: Path, stored: Stored, progress: Callable[[int], None]) -> None:
    """Tied tensors are written once, as transformers does; shards one after the other."""
    tensors = _untied(stored.state)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    done = 0
    with replaced_folder(path) as partial:
        for name, shard in zip(names, shards, strict=True):
            write_tensors(partial / name, shard, {"format": "pt"})
            done += sum(value.nbytes for value in shard.values())
            progress(done)
        if len(shards) > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            write_bytes(partial / INDEX, _bytes({"metadata": {"total_size": done}, "weight_map": where}))
        if stored.carried:
            write_tensors(partial / CARRIED, _untied(stored.carried))
        write_bytes(partial / CONFIG, _bytes(stored.config or {}))


def _shards(path: Path) -> dict[str, list[str]]:
    """The files of weights, and the names each has to hold by the index."""
    if (path / SINGLE).is_file():
        return {SINGLE: []}
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path}: expected {SINGLE} or {INDEX}, got neither")
    index = read_json(path / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise CheckpointError(f"{path / INDEX}: expected a weight_map, got {type(places).__name__}")
    shards: dict[str, list[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise CheckpointError(f"{path / INDEX}: expected plain file names, got {file!r}")
        if not (path / file).is_file():
            raise CheckpointError(f"{path}: {file} is missing")
        shards.setdefault(file, []).append(name)
    return shards


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged file: {error}") from error


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor once, under the name it is known by in `TIED` if there are several."""
    copies = {name for name, _ in TIED}
    kept: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.dtype, value.shape) if value.numel() else (name,)
        if place not in kept or kept[place] in copies:
            kept[place] = name
    return {name: state[name].contiguous() for name in state if name in set(kept.values())}


# --- ours: `model/checkpoints.py` ---


def read_ours(path: Path) -> Stored:
    if not path.is_dir() and not beside(path, "previous").is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint's folder, got a file")
    checkpoint = load_checkpoint(path)
    config = checkpoint.config.get("transformers") or _trained_config(checkpoint)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: expected a checkpoint of `blip2-kernels convert` or `train`, got one whose "
            f"configuration has {', '.join(sorted(checkpoint.config)) or 'nothing'}"
        )
    return Stored(checkpoint.state, checkpoint.extra.get("carried", {}), config)


def _trained_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """transformers' configuration of what `blip2-kernels train` saved, of frozen parts with widths only."""
    model = checkpoint.config.get("model")
    if checkpoint.config.get("stage") not in (1, 2) or not isinstance(model, dict) or "qformer" not in model:
        return None
    qformer = model["qformer"]
    instruct = qformer.get("model_type") not in (None, "blip_2_qformer")
    # A stand-in that can be built, until a folder says more: nothing of it is used.
    text: dict[str, Any] = {"model_type": "opt"}
    if "language_projection.weight" in checkpoint.state:
        width = checkpoint.state["language_projection.weight"].shape[0]
        text |= {"hidden_size": width, "word_embed_proj_dim": width, "num_attention_heads": 1}
        folder = Path(checkpoint.config.get("language_model") or "")
        if (folder / CONFIG).is_file():
            text = read_json(folder / CONFIG)
    return {
        "model_type": "instructblip" if instruct else "blip-2",
        "qformer_config": qformer,
        "vision_config": {
            "model_type": "instructblip_vision_model" if instruct else "blip_2_vision_model",
            "hidden_size": qformer["encoder_hidden_size"],
            "num_attention_heads": 1,
        },
        "text_config": text,
        "num_query_tokens": model["num_query_tokens"],
        "image_text_hidden_size": model.get("image_text_hidden_size", 256),
    }


def write_ours(path: Path, stored: Stored, progress: Callable[[int], None]) -> None:
    save_checkpoint(
        path,
        stored.state,
        config={"transformers": stored.config or {}},
        extra={"carried": stored.carried} if stored.carried else None,
        check_finite=False,  # `convert` has looked, and named what it found
    )
    progress(sum(value.nbytes for value in stored.state.values()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


WRITERS: dict[Format, Callable[[Path, Stored, Callable[[int], None]], None]] = {
    "lavis": write_lavis,
    "transformers": write_transformers,
    "blip2_kernels": write_ours,
}
