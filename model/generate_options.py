"""What is asked of the options of transformers' `generate` before they reach it: it passes over some that
make no sense, and trips on others deep inside, naming no argument of ours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import GenerationConfig

from blip2_kernels.checks import check_bool, check_finite, check_function, check_int, describe

DEFAULT_NEW_TOKENS = 20
"""What transformers' `generate` makes where nobody says how many."""
MODEL_INPUTS = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values",
    "encoder_outputs", "visual_features", "visual_mask",
)  # fmt: skip
"""What `generate` would read, which the models of both stages make of images and prompt."""

Check = Callable[[str, Any], Any]


def _whole(minimum: int) -> Check:
    return lambda name, value: check_int(name, value, minimum)


def _number(**bounds: float) -> Check:
    return lambda name, value: check_finite(name, value, **bounds)


def _token_ids(name: str, value: Any) -> None:
    for token in value if isinstance(value, list | tuple) else [value]:
        check_int(name, token, -1)  # which many configurations have for "none"


def _early_stopping(name: str, value: Any) -> None:
    if not isinstance(value, bool) and value != "never":
        raise TypeError(f"{name}: expected a bool or 'never', got {describe(value)}")


def _functions(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or not all(map(callable, value)):
        raise TypeError(f"{name}: expected a list of functions, got {describe(value)}")


def _streamer(name: str, value: Any) -> None:
    streamers = value if isinstance(value, list | tuple) else [value]
    if not all(callable(getattr(one, method, None)) for one in streamers for method in ("put", "end")):
        raise TypeError(f"{name}: expected a streamer with put and end, got {describe(value)}")


def _assistant(name: str, value: Any) -> None:
    raise TypeError(f"{name}: expected None, since an assistant sees no image, got {describe(value)}")


# Fields of a GenerationConfig, by name; those that are not here are left to transformers.
FIELDS: dict[str, Check] = {
    **dict.fromkeys(("do_sample", "use_cache", "return_dict_in_generate", "output_scores"), check_bool),
    **dict.fromkeys(("num_beams", "num_return_sequences", "max_new_tokens", "max_length"), _whole(1)),
    **dict.fromkeys(("top_k", "min_new_tokens", "min_length", "no_repeat_ngram_size"), _whole(0)),
    **dict.fromkeys(("temperature", "repetition_penalty", "max_time"), _number(above=0)),
    **dict.fromkeys(("top_p", "typical_p"), _number(above=0, maximum=1)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff"), _number(minimum=0, maximum=1)),
    "length_penalty": _number(),
    "early_stopping": _early_stopping,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _token_ids),
}
ARGUMENTS: dict[str, Check] = {
    **FIELDS,
    "streamer": _streamer,
    **dict.fromkeys(("logits_processor", "stopping_criteria"), _functions),
    "prefix_allowed_tokens_fn": check_function,
    "assistant_model": _assistant,
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def option_in_effect(name: str, options: Mapping[str, Any], default: GenerationConfig | None = None) -> Any:
    """What transformers' `generate` takes an option to be: as given, else as the `generation_config` among
    the options says, else as the model's own, `default`, says; None where none of them does."""
    sources = (getattr(config, name, None) for config in (options.get("generation_config"), default))
    return next((value for value in (options.get(name), *sources) if value is not None), None)


def check_generate_options(options: Mapping[str, Any], default: GenerationConfig | None = None) -> None:
    """Check what `generate` would pass over or trip on; None stands for an option that was not given.

    Args:
        options: for `generate`, a `generation_config` among them.
        default: what stands in for what they leave open.

    Raises:
        TypeError, ValueError: an option, or a field of the `generation_config`, of the wrong kind or out of
            range; one of `MODEL_INPUTS`; or options of sampling where nothing is sampled, which transformers
            only warns of.
    """
    for name in MODEL_INPUTS:
        if name in options:
            raise TypeError(f"{name}: expected image and prompt as named here, got {describe(options[name])}")
    for name, check in ARGUMENTS.items():
        if options.get(name) is not None:
            check(name, options[name])
    config = options.get("generation_config")
    if config is not None:
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"generation_config: expected a GenerationConfig, got {describe(config)}")
        for name, check in FIELDS.items():
            if getattr(config, name, None) is not None:
                check(f"generation_config.{name}", getattr(config, name))
    sampled = option_in_effect("do_sample", options, default)
    for name in SAMPLING:
        if not sampled and options.get(name) is not None:
            raise ValueError(f"{name}: expected None without do_sample=True, got {describe(options[name])}")
    least, most = options.get("min_new_tokens"), option_in_effect("max_new_tokens", options, default)
    if least is not None and most is not None and least > most:
        raise ValueError(f"min_new_tokens: expected at most max_new_tokens, {most}, got {least}")


def limit_new_tokens(
    model: nn.Module, options: Mapping[str, Any], length: int, limit: int | None
) -> dict[str, Any]:
    """Options of `generate` under which no token is given a position that the table does not have.

    Args:
        model: whose `generation_config` stands in for what the options leave open.
        options: for `generate`, checked.
        length: rows in front of the first new token, which `max_length` counts too.
        limit: of the position table; None for none.

    Returns:
        The options. Where neither they nor the model bound the new tokens, transformers' default is cut to
        the room there is.

    Raises:
        ValueError: `max_new_tokens`, or else `max_length`, is more than there is room for, or `max_length`
            leaves no room for a token.
    """
    options, default = dict(options), getattr(model, "generation_config", None)
    name, front = "max_new_tokens", 0
    wanted = option_in_effect(name, options, default)  # which goes before max_length, wherever each is said
    if wanted is None:
        name, front = "max_length", length
        wanted = option_in_effect(name, options, default)
        if wanted is not None and wanted <= length:
            raise ValueError(
                f"max_length: expected at least {length + 1} behind {length} rows of prompt, got {wanted}"
            )
    if limit is None:
        return options
    room = limit - length + 1  # the last token of all is never read
    if wanted is None:
        if room < DEFAULT_NEW_TOKENS:
            options["max_new_tokens"] = room
    elif wanted - front > room:
        raise ValueError(
            f"{name}: expected at most {room + front} behind {length} rows of prompt (the position table "
            f"holds {limit}), got {wanted}"
        )
    return options
