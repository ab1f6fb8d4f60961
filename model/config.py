"""What a stage-1 (representation learning) model is made of."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from transformers import Blip2Config, Blip2QFormerConfig

from blip2_kernels.checks import check_finite, check_int, check_probability, describe
from blip2_kernels.layout import MAX_ORDINALS

LM_NORMALISATIONS = ("rank", "global")
ITC_GRADIENTS = ("local", "full")
STAGE2_FIELDS = ("text_config", "vision_config", "language_model", "language_projection", "text_model")


# Not frozen: transformers' Trainer sets `use_cache` on the configuration of whatever it trains.
@dataclasses.dataclass(eq=False)
class Blip2PreTrainingConfig:
    """Configuration of stage 1: image-text contrast, matching and grounded generation (paper section 3.2).

    Attributes:
        qformer: the Q-Former; `use_qformer_text_input` must be True, since all three losses read text.
        num_query_tokens: Q, learned queries an image.
        image_text_hidden_size: E, width of the space in which images and texts are compared.
        pad_token_id: filler of a batch; never a label of the caption loss.
        cls_token_id: what texts begin with; the text feature is read there.
        sep_token_id: what texts end with; generation stops there.
        dec_token_id: [DEC], in place of the first token where the text is to be generated; default the last
            entry of the vocabulary (30522 of a BERT vocabulary that was extended to 30523).
        temperature: where the learned temperature of the contrastive loss starts.
        label_smoothing: of the contrastive and the caption loss, in [0, 1).
        lm_normalisation: "rank" takes the mean over the tokens of each rank, as LAVIS does; "global" divides
            by the tokens of all ranks, so that the split of a batch over ranks does not matter.
        itc_gradient: "local" lets no gradient through features gathered from the ranks, own rows included, as
            LAVIS does; "full" does. They coincide where there is one rank only.
        max_text_length: columns that texts are padded or cut to by the tokenizer, at most the Q-Former's
            position table; also the default bound of a generated caption.

    Raises:
        TypeError, ValueError: a field of the wrong kind or value, named in the message.
    """

    qformer: Blip2QFormerConfig
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    dec_token_id: int | None = None
    temperature: float = 0.07
    label_smoothing: float = 0.1
    lm_normalisation: Literal["rank", "global"] = "rank"
    itc_gradient: Literal["local", "full"] = "local"
    max_text_length: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.qformer, Blip2QFormerConfig):
            raise TypeError(f"qformer: expected a Blip2QFormerConfig, got {describe(self.qformer)}")
        if not self.qformer.use_qformer_text_input:
            raise ValueError(
                "qformer.use_qformer_text_input: expected True, since stage 1 reads text, got False (the "
                "Q-Former of a stage-2 model, which has no text embeddings and no text feed-forward)"
            )
        check_int("num_query_tokens", self.num_query_tokens, 1, MAX_ORDINALS)
        check_int("image_text_hidden_size", self.image_text_hidden_size, 1)
        check_int("max_text_length", self.max_text_length, 2, self.qformer.max_position_embeddings)
        last = self.qformer.vocab_size - 1
        if self.dec_token_id is None:
            self.dec_token_id = last
        names = ("pad_token_id", "cls_token_id", "sep_token_id", "dec_token_id")
        for name in names:
            check_int(name, getattr(self, name), 0, last)
        ids = [getattr(self, name) for name in names]
        if len(set(ids)) != len(ids):
            raise ValueError(f"{', '.join(names)}: expected distinct tokens, got {ids}")
        if self.qformer.pad_token_id not in (None, self.pad_token_id):
            raise ValueError(
                f"pad_token_id: expected qformer's {self.qformer.pad_token_id}, got {self.pad_token_id}"
            )
        check_finite("temperature", self.temperature, above=0)
        check_probability("label_smoothing", self.label_smoothing)
        check_choice("lm_normalisation", self.lm_normalisation, LM_NORMALISATIONS)
        check_choice("itc_gradient", self.itc_gradient, ITC_GRADIENTS)

    def __eq__(self, other: object) -> bool:
        # By content: transformers' own comparison finds a loaded configuration unequal to the saved one.
        if not isinstance(other, Blip2PreTrainingConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; the Q-Former's configuration as transformers writes it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "qformer": self.qformer.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Blip2PreTrainingConfig":
        """The inverse of `to_dict`.

        Raises:
            TypeError: not a mapping.
            ValueError: a field that stage 1 does not have (those of stage 2 are named as such), or no
                Q-Former.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields: expected a mapping, got {describe(fields)}")
        _check_fields(cls, fields)
        qformer = fields.get("qformer")
        if isinstance(qformer, Mapping):
            qformer = read_qformer(Blip2QFormerConfig, qformer)
        if qformer is None:
            raise ValueError(f"fields: expected an entry 'qformer', got {sorted(fields)}")
        return cls(**{**fields, "qformer": qformer})

    @classmethod
    def from_blip2_config(cls, config: Blip2Config, **overrides: Any) -> "Blip2PreTrainingConfig":
        """Take the Q-Former, the number of queries and the feature width from a transformers configuration.

        Args:
            config: of a model with text input (such as a BLIP-2 image-text matching checkpoint).
            overrides: any other field of this class.

        Raises:
            TypeError: not a Blip2Config.
            ValueError: a stage-2 configuration (its Q-Former reads no text), or an override that is no field.
        """
        if not isinstance(config, Blip2Config):
            raise TypeError(f"config: expected a Blip2Config, got {describe(config)}")
        if not config.qformer_config.use_qformer_text_input:
            raise ValueError(
                "config: expected a Q-Former that reads text (qformer_config.use_qformer_text_input=True and "
                "a vocabulary with [DEC]), got the configuration of a stage-2 model"
            )
        _check_fields(cls, overrides)
        fields: dict[str, Any] = {
            "qformer": copy.deepcopy(config.qformer_config),
            "num_query_tokens": config.num_query_tokens,
            "image_text_hidden_size": config.image_text_hidden_size,
        }
        return cls(**{**fields, **overrides})


def read_qformer(config_class: Any, fields: Mapping[str, Any]) -> Any:
    """A Q-Former's configuration from the entry `qformer` of a stored one.

    Raises:
        ValueError: a field of the wrong kind.
    """
    try:
        return config_class.from_dict(dict(fields))
    except Exception as error:  # of huggingface_hub, in some versions
        reason = " ".join(str(error).split())
        raise ValueError(f"qformer: expected fields of {config_class.__name__}: {reason}") from error


def _check_fields(cls: type, fields: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    mixed = [name for name in fields if name in STAGE2_FIELDS]
    if mixed:
        raise ValueError(f"config: expected the fields of stage 1 only, got {', '.join(mixed)} of stage 2")
    unknown = [str(name) for name in fields if name not in known]
    if unknown:
        names = ", ".join(sorted(known))
        raise ValueError(f"config: expected fields among {names}, got {', '.join(unknown)}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that an argument is one of some words; raises ValueError."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
