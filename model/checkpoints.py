"""Checkpoints that are complete or absent, and refuse to load when a single bit of them has changed.

A checkpoint is a directory:

    model.safetensors        the weights, every tied weight once
    <name>.safetensors       further tensors the caller asked for (`extra`), such as an optimizer's
    config.json              how to build the model
    metadata.json            anything else that JSON can hold: the step, metrics, seeds
    manifest.json            size and SHA-256 of each file above, the tied weights, and its own SHA-256

It is written next to its final name, flushed to the disk, and renamed at the very end. A process that dies,
or a disk that fills up, leaves the previous checkpoint of that name, whole. Neither .pt nor safetensors files
notice a flipped bit by themselves; here loading compares every file with the manifest first.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from blip2_kernels.checks import check_device, describe

from .atomic import beside, replaced_folder, write_bytes, write_tensors

FORMAT = 1
MODEL, CONFIG, METADATA, MANIFEST = "model.safetensors", "config.json", "metadata.json", "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or does not fit the model."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found.

    Attributes:
        state: the model's tensors by name; tied weights are the same tensor under several names.
        config: as saved (tuples come back as lists, as JSON has none).
        metadata: as saved, {} if there was none.
        extra: the further sets of tensors by the name they were saved under.
        path: the directory they were read from.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, Any]
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    path: Path = Path()


@dataclass(frozen=True)
class LoadReport:
    """Names that `load_into` left alone: the model's without a weight, and the weights without a place."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def save_checkpoint(
    path_dir: str | os.PathLike[str],
    model_state: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
    check_finite: bool = True,
) -> Path:
    """Write a checkpoint, replacing one of the same name only once the new one is complete on the disk.

    Call it from one process of a job (rank 0).

    Args:
        path_dir: the checkpoint's directory; parents are created. What stands there must be a checkpoint or
            an empty directory, since it is replaced as a whole.
        model_state: tensors by name, any device, dtype and layout (`module.state_dict()`). Names that share
            one tensor are stored once and come back tied.
        config: JSON object that says how to build the model.
        metadata: further JSON object.
        extra: further sets of tensors, each saved as `<name>.safetensors`.
        check_finite: refuse weights that are NaN or infinite.

    Returns:
        The directory.

    Raises:
        TypeError: a value that is no tensor, a name that is no string, an object JSON cannot hold.
        ValueError: NaN or infinite weights (all of them named), a file name that is none, a directory that
            holds something else.
        OSError: the disk is full or cannot be written; the previous checkpoint is untouched.
    """
    path = _final_path(path_dir)
    tensors = {"model": model_state, **_checked_extra(extra)}
    documents = {CONFIG: _json_bytes("config", config), METADATA: _json_bytes("metadata", metadata or {})}
    stored: dict[str, dict[str, Tensor]] = {}
    tied: dict[str, dict[str, str]] = {}
    for name, state in tensors.items():
        argument = "model_state" if name == "model" else f"extra[{name!r}]"
        stored[name], tied[name] = _untie(_checked_state(argument, state))
        if check_finite:
            _refuse_nonfinite(argument, stored[name])
    if path.exists() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise ValueError(f"path_dir: expected a checkpoint or an empty directory to replace, got {path}")

    with replaced_folder(path) as partial:
        for name, state in stored.items():
            write_tensors(partial / f"{name}.safetensors", state)
        for name, content in documents.items():
            write_bytes(partial / name, content)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in partial.iterdir()
        }
        write_bytes(partial / MANIFEST, _manifest_bytes({"format": FORMAT, "files": files, "tied": tied}))
    return path


def load_checkpoint(
    path_dir: str | os.PathLike[str], *, device: str | torch.device = "cpu", check_finite: bool = False
) -> Checkpoint:
    """Read a checkpoint after comparing every byte of it with its manifest.

    Args:
        path_dir: the directory given to `save_checkpoint`.
        device: where the tensors go.
        check_finite: refuse weights that are NaN or infinite.

    Raises:
        FileNotFoundError: there is no checkpoint of that name.
        CheckpointError: a file is missing, cut short or changed, the manifest is not one of ours, or (with
            `check_finite`) weights are NaN or infinite.
        TypeError, ValueError: a path or device that is none, or a device that is not here.
    """
    device = check_device("device", device)
    path = _readable_path(_final_path(path_dir))
    manifest = _read_manifest(path)
    faults = [fault for name, entry in manifest["files"].items() if (fault := _fault(path / name, entry))]
    if faults:
        raise CheckpointError(f"{path}: damaged checkpoint: " + "; ".join(faults))

    states = {}
    for name in manifest["files"]:
        stem, suffix = os.path.splitext(name)
        if suffix == ".safetensors":
            state = safetensors.torch.load_file(path / name, device=str(device))
            if check_finite:
                _refuse_nonfinite(f"{path / name}", state)
            states[stem] = state | {alias: state[kept] for alias, kept in manifest["tied"][stem].items()}
    config, metadata = (json.loads((path / name).read_bytes()) for name in (CONFIG, METADATA))
    return Checkpoint(states.pop("model"), config, metadata, states, path)


def load_into(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> LoadReport:
    """Copy tensors into a model's parameters and buffers, or change nothing and name all that is wrong.

    Args:
        model: receives the values, cast to its own dtypes and devices.
        state: tensors by name, such as `Checkpoint.state`.
        strict: refuse missing and unexpected names. Shapes must fit in any case.

    Returns:
        The names left alone (empty with `strict`).

    Raises:
        TypeError: no model, or a state that is no mapping of names to tensors.
        CheckpointError: names every missing, unexpected and mis-shaped tensor at once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = _checked_state("state", state)
    missing = tuple(name for name in own if name not in given)
    unexpected = tuple(name for name in given if name not in own)
    unfit = [
        f"{name} (expected {_shape(own[name])}, got {_shape(value)})"
        for name, value in given.items()
        if name in own
        and (own[name].shape != value.shape or own[name].is_floating_point() != value.is_floating_point())
    ]
    found = {"mis-shaped": unfit}
    if strict:
        found = {"missing": list(missing), "unexpected": list(unexpected), **found}
    if any(found.values()):
        parts = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in found.items() if names]
        raise CheckpointError(f"state: does not fit {type(model).__name__}: " + "; ".join(parts))
    model.load_state_dict({name: given[name] for name in own if name in given}, strict=False)
    return LoadReport(missing, unexpected)


def latest_checkpoint(directory: str | os.PathLike[str], *, verify: bool = False) -> Path | None:
    """The checkpoint in `directory` with the highest number at the end of its name, or None.

    Args:
        directory: holds checkpoints such as `step-100`, `step-2000`. One that does not exist holds none.
            Names without a number come before all others; equal ones are ordered by time.
        verify: pass over checkpoints that `load_checkpoint` would refuse as damaged (reads every byte).

    Raises:
        TypeError: no path.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory: expected a path, got {describe(directory)}")
    directory = Path(directory)
    if not directory.is_dir():
        return None
    names = {
        match[1] if (match := re.fullmatch(r"\.(.+)\.previous", entry.name)) else entry.name
        for entry in directory.iterdir()
    }
    found = []
    for path in (directory / name for name in names if not name.startswith(".")):
        try:
            manifest = _readable_path(path) / MANIFEST
            number = re.search(r"(\d+)$", path.name)
            found.append((int(number[1]) if number else -1, manifest.stat().st_mtime_ns, path))
        except FileNotFoundError:
            continue
    for _, _, path in sorted(found, reverse=True):
        if not verify or _is_intact(path):
            return path
    return None


# --- names and directories ---


def _final_path(path_dir: str | os.PathLike[str]) -> Path:
    if not isinstance(path_dir, str | os.PathLike):
        raise TypeError(f"path_dir: expected a path, got {describe(path_dir)}")
    path = Path(os.path.abspath(path_dir))
    if path.name == "" or path.name.startswith("."):
        raise ValueError(f"path_dir: expected a directory whose name does not begin with a dot, got {path}")
    if path.exists() and not path.is_dir():
        raise ValueError(f"path_dir: expected a directory, got the file {path}")
    return path


def _readable_path(path: Path) -> Path:
    for candidate in (path, beside(path, "previous")):
        if (candidate / MANIFEST).is_file():
            return candidate
    if path.is_dir() and any((path / name).exists() for name in (MODEL, CONFIG, METADATA)):
        raise CheckpointError(f"{path}: damaged checkpoint: {MANIFEST} is missing")
    raise FileNotFoundError(errno.ENOENT, "no checkpoint (a directory with a manifest.json)", str(path))


# --- what may be saved ---


def _checked_state(argument: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{argument}: expected a mapping of names to tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names of type str, got {name!r}")
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            kind = type(value).__name__
            if isinstance(value, Tensor):
                kind = "a tensor without data" if value.is_meta else f"a tensor of layout {value.layout}"
            raise TypeError(f"{argument}[{name!r}]: expected a dense tensor, got {kind}")
    return dict(state)


def _checked_extra(extra: Mapping[str, Mapping[str, Tensor]] | None) -> dict[str, Mapping[str, Tensor]]:
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(f"extra: expected a mapping of names to sets of tensors, got {describe(extra)}")
    for name in extra or {}:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "model":
            raise ValueError(
                "extra: expected names of letters, digits, '.', '_' and '-', none of them 'model'; "
                f"got {name!r}"
            )
    return dict(extra or {})


def _untie(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state into the tensors to store, each once, and the other names of those that have several."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        value = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, as Q, K and V of one fused buffer do: copy them.
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        kept[name] = value
    return kept, tied


def _refuse_nonfinite(argument: str, state: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in state.items() if not all_finite(value)]
    if bad:
        message = f"{argument}: expected finite values, got NaN or infinity in {', '.join(bad)}"
        raise CheckpointError(f"{message} (check_finite=False allows them)")


def all_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if value.element_size() == 1:  # float8 has no isfinite
        value = value.float()
    if value.numel() == 0 or not value.is_floating_point():
        return True
    # NaN and infinity reach the extremes, and nothing of the tensor's size is made on the way.
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value))


def _json_bytes(argument: str, document: Mapping[str, Any]) -> bytes:
    if not isinstance(document, Mapping):
        raise TypeError(f"{argument}: expected a mapping, got {type(document).__name__}")
    _check_keys(argument, document)
    try:
        return (json.dumps(dict(document), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{argument}: expected what JSON can hold, got an object it cannot: {error}"
        ) from error


def _check_keys(argument: str, document: Any) -> None:
    """JSON turns other keys into strings: {1: x} would come back as {"1": x}."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            if not isinstance(key, str):
                raise TypeError(f"{argument}: expected keys of type str, got {key!r}")
            _check_keys(f"{argument}[{key!r}]", value)
    elif isinstance(document, list | tuple):
        for position, value in enumerate(document):
            _check_keys(f"{argument}[{position}]", value)


# --- bytes on the disk ---


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    """The manifest with its own checksum, in the one spelling that `_read_manifest` accepts."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=2, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    raw = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        intact = isinstance(manifest, dict) and _manifest_bytes(manifest) == raw
    except ValueError:
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: damaged checkpoint: {MANIFEST} does not match its own checksum")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, got {manifest.get('format')!r}")
    # The checksum guards against accidents; a manifest made on purpose must not lead out of the directory.
    for name in manifest["files"]:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(f"{path}: {MANIFEST}: expected plain file names, got {name!r}")
    absent = {MODEL, CONFIG, METADATA} - manifest["files"].keys()
    if absent:
        raise CheckpointError(
            f"{path}: {MANIFEST}: expected entries for {', '.join(sorted(absent))}, got none"
        )
    return manifest


def _fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with one file, or None."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return f"{path.name}: expected a plain file"
    if not path.exists():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path.name}: expected {entry['bytes']} bytes, got {size}"
    if _sha256(path) != entry["sha256"]:
        return f"{path.name}: its SHA-256 differs from the manifest's"
    return None


def _is_intact(path: Path) -> bool:
    try:
        source = _readable_path(path)
        return not any(_fault(source / name, e) for name, e in _read_manifest(source)["files"].items())
    except CheckpointError:
        return False


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
