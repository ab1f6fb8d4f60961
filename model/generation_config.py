"""What the trained part of a stage-2 (generative learning) model is made of."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig

from blip2_kernels.checks import check_finite, check_int, describe
from blip2_kernels.layout import MAX_ORDINALS

from .config import read_qformer

__all__ = ["Blip2GenerationConfig"]

QFORMER_CONFIGS = {
    "blip_2_qformer": Blip2QFormerConfig,
    "instructblip_qformer": InstructBlipQFormerConfig,
    "instructblipvideo_qformer": InstructBlipQFormerConfig,
}


# Not frozen: see `Blip2PreTrainingConfig`.
@dataclasses.dataclass
class Blip2GenerationConfig:
    """Configuration of the trainable part of stage 2 (BLIP-2 paper, section 3.3).

    Attributes:
        qformer: the Q-Former. A `Blip2QFormerConfig` must have `use_qformer_text_input=False`: in stage 2 it
            reads images only. An `InstructBlipQFormerConfig` (InstructBLIP) reads the instruction too.
        num_query_tokens: Q, learned queries and rows of the soft prompt.
        vision_layer_norm_eps: of `ln_vision`. 1e-5 is LAVIS's; transformers' checkpoints say 1e-6.

    Raises:
        TypeError, ValueError: a field of the wrong kind or value, or one that belongs to stage 1.
    """

    qformer: Blip2QFormerConfig | InstructBlipQFormerConfig
    num_query_tokens: int = 32
    vision_layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if getattr(self.qformer, "model_type", None) not in QFORMER_CONFIGS:
            raise TypeError(
                "qformer: expected a Blip2QFormerConfig or InstructBlipQFormerConfig, got "
                f"{describe(self.qformer)}"
            )
        if getattr(self.qformer, "use_qformer_text_input", False):
            raise ValueError(
                "qformer.use_qformer_text_input: expected False, since the Q-Former of stage 2 reads images "
                "only, got True (a stage-1 model becomes a stage-2 model through from_pretraining)"
            )
        check_int("num_query_tokens", self.num_query_tokens, 1, MAX_ORDINALS)
        check_finite("vision_layer_norm_eps", self.vision_layer_norm_eps, above=0)

    @property
    def is_instruct(self) -> bool:
        """Whether the Q-Former reads an instruction (InstructBLIP)."""
        return self.qformer.model_type != "blip_2_qformer"

    @classmethod
    def from_any(cls, config: Any) -> "Blip2GenerationConfig":
        """Take `config` as it is, or read a transformers `Blip2Config` or `InstructBlipConfig`.

        Raises:
            TypeError: something else.
            ValueError: a stage-1 configuration, of either library.
        """
        if isinstance(config, cls):
            return config
        if type(config).__name__ == "Blip2PreTrainingConfig":
            raise ValueError(
                "config: expected the configuration of a stage-2 model, got a Blip2PreTrainingConfig of "
                "stage 1; its trained model becomes a stage-2 model through from_pretraining"
            )
        parts = ("qformer_config", "vision_config", "text_config", "num_query_tokens")
        if not all(hasattr(config, name) for name in parts):
            raise TypeError(
                "config: expected a Blip2GenerationConfig, Blip2Config or InstructBlipConfig, got "
                f"{describe(config)}"
            )
        return cls(
            copy.deepcopy(config.qformer_config),
            config.num_query_tokens,
            config.vision_config.layer_norm_eps,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; the Q-Former's configuration as transformers writes it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "qformer": self.qformer.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Blip2GenerationConfig":
        """The inverse of `to_dict`.

        Raises:
            TypeError: not a mapping.
            ValueError: a field that stage 2 does not have, or no Q-Former.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields: expected a mapping, got {describe(fields)}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in fields if name not in known)
        if unknown:
            raise ValueError(
                f"config: expected the fields of stage 2 ({', '.join(known)}), got {', '.join(unknown)}"
            )
        qformer = fields.get("qformer")
        if isinstance(qformer, Mapping):
            config_class = QFORMER_CONFIGS.get(str(qformer.get("model_type", "blip_2_qformer")))
            if config_class is None:
                raise ValueError(
                    f"qformer.model_type: expected one of {', '.join(QFORMER_CONFIGS)}, got "
                    f"{qformer['model_type']!r}"
                )
            qformer = read_qformer(config_class, qformer)
        return cls(**{**fields, "qformer": qformer})
