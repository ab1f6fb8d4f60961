"""Reading a transformers model folder whole: a weight that is not there is an error, not a random number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["load_pretrained"]


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
        ValueError: names all weights that are missing or of another shape. Weights tied to another and what
            the folder holds beyond the model (a text half, a classifier) do not count.
    """
    model, found = loader.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
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
