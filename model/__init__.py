"""The full BLIP-2 system: Q-Former, both training stages, retrieval, captioning, data and training.

Names are imported on first use, so that `import blip2_kernels.model` costs nothing.
"""

import importlib
from typing import Any

_EXPORTS = {
    "Blip2Base": "base",
    "Blip2ForConditionalGeneration": "generation",
    "Blip2ForImageTextRetrieval": "retrieval",
    "Blip2ForPreTraining": "pretraining",
    "Blip2PreTrainingConfig": "config",
    "FeatureCache": "vision",
    "FrozenVisionEncoder": "vision",
    "LMHead": "qformer",
    "QFormerCache": "qformer",
    "QFormerModel": "qformer",
    "QFormerOutput": "qformer",
    "TextEmbeddings": "qformer",
    "copy_text_feed_forward_to_query": "qformer_init",
    "generate_captions": "captioning",
    "init_bert_weights": "qformer_init",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
