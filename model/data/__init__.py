"""Image-text data: manifests, datasets that survive broken files, collators, batches.

Names are imported on first use, so that nothing here is paid for before it is needed.
"""

import importlib
from typing import Any

_EXPORTS = {
    "CaptionCollator": "collate",
    "GenerationCollator": "collate",
    "ImageTextDataset": "image_text",
    "Manifest": "manifest",
    "Pair": "manifest",
    "RandomResizedCrop": "image_text",
    "ShuffledBatches": "batches",
    "read_manifest": "manifest",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
