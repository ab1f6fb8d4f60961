"""Reading a transformers model folder whole: a weight that is not there is an error, not a random number."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from blip2_kernels.checks import describe

__all__ = ["check_model_folder", "load_pretrained", "read_config", "read_json"]


def read_json(name: str, path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        name: what is read, for the message.
        path: the file.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: not JSON, or something else than an object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise ValueError(f"{name}: expected JSON in {path}, got what cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object in {path}, got {describe(found)}")
    return found


def check_model_folder(name: str, folder: str | Path, other: str = "") -> Path:
    """Check a folder with a `config.json`.

    Args:
        name: what is to be loaded, for the message.
        folder: where from.
        other: what might stand in its place, for the message.

    Raises:
        TypeError: no path.
        FileNotFoundError: no such folder, or one without `config.json`.
    """
    if not isinstance(folder, str | Path):
        raise TypeError(f"{name}: expected a path, got {describe(folder)}")
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{name}: expected {other}a model folder with config.json, got {folder}")
    return Path(folder)


def read_config(name: str, folder: str | Path) -> Any:
    """The configuration of a model folder, through transformers' `AutoConfig`.

    Raises:
        FileNotFoundError: no `config.json` there.
        ValueError: not JSON, or no configuration that this transformers knows.
    """
    from transformers import AutoConfig

    read_json(name, check_model_folder(name, folder) / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    # A field of the wrong kind surfaces as whatever checks it: a KeyError, a huggingface_hub error, ...
    except Exception as error:
        raise ValueError(f"{name}: expected a configuration of transformers in {folder}: {error}") from error


def load_pretrained(
    name: str, loader: Any, folder: str | Path, *, optional: Sequence[str] = (), **options: Any
) -> Any:
    """`loader.from_pretrained(folder)`, which by itself draws a missing weight at random and only prints so.

    Args:
        name: what is loaded, for the message.
        loader: a transformers model class or auto class.
        folder: a local folder; nothing is fetched.
        optional: parts of the model that are taken out (None in their place) where the folder lacks them.
        options: for `from_pretrained`.

    Raises:
        ValueError: no file of weights that can be read; or names all weights that are missing or of another
            shape. Weights tied to another and what the folder holds beyond the model (a text half, a
            classifier) do not count.
    """
    try:
        model, found = loader.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{name}: cannot load {folder}: {error}") from error
    missing = sorted(set(found["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or ()))
    for part in optional:
        inside = [key for key in missing if key.startswith(f"{part}.")]
        if inside:
            setattr(model, part, None)
        missing = [key for key in missing if key not in inside]
    problems = [f"missing {key}" for key in missing] + [
        f"{key} expected {list(wanted)}, got {list(stored)}"
        for key, stored, wanted in sorted(found["mismatched_keys"])
    ]
    if problems:
        raise ValueError(
            f"{name}: {folder} does not hold all weights of its {type(model).__name__}: {', '.join(problems)}"
        )
    return model
