"""What stage 2 asks of a language model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from blip2_kernels.checks import check_int, describe

DEFAULT_NEW_TOKENS = 20
"""What transformers' `generate` makes where nobody says how many."""


def check_language_model(language_model: Any) -> None:
    wanted = "a language model that generates (AutoModelForCausalLM or AutoModelForSeq2SeqLM)"
    if not isinstance(language_model, nn.Module):
        raise TypeError(f"language_model: expected {wanted}, got {describe(language_model)}")
    for name in ("generate", "get_input_embeddings", "config"):
        if not hasattr(language_model, name):
            raise TypeError(
                f"language_model: expected {wanted}, got a {type(language_model).__name__} without {name}"
            )


def position_limit(language_model: nn.Module) -> int | None:
    """Rows a table of learned positions has room for; None where positions are relative or rotary."""
    limit = getattr(language_model.config, "max_position_embeddings", None)
    words = language_model.get_input_embeddings()
    if not isinstance(limit, int):
        return None
    # OPT and BART keep two rows in front of the table, others none.
    tables = [part for part in language_model.modules() if isinstance(part, nn.Embedding)]
    has_room = [limit <= table.num_embeddings <= limit + 2 for table in tables if table is not words]
    return limit if any(has_room) else None


def check_sampling(options: Mapping[str, Any], do_sample: bool) -> None:
    """Refuse options of sampling where nothing is sampled, which transformers passes over with a warning."""
    for name in ("temperature", "top_k", "top_p"):
        if not do_sample and options.get(name) is not None:
            raise ValueError(f"{name}: expected None without do_sample=True, got {describe(options[name])}")


def check_generate_options(language_model: nn.Module, options: Mapping[str, Any]) -> None:
    """Check what `generate` would pass over or trip on.

    Raises:
        TypeError, ValueError: a number of beams below 1, or options of sampling where nothing is sampled.
    """
    if options.get("num_beams") is not None:
        check_int("num_beams", options["num_beams"], 1)
    config = _generation_config(language_model, options)
    sampled = options.get("do_sample")
    check_sampling(options, bool(getattr(config, "do_sample", False) if sampled is None else sampled))


def _generation_config(language_model: nn.Module, options: Mapping[str, Any]) -> Any:
    """What stands in for what the options leave open."""
    return options.get("generation_config") or getattr(language_model, "generation_config", None)


def limit_new_tokens(
    language_model: nn.Module, options: Mapping[str, Any], length: int, limit: int | None
) -> dict[str, Any]:
    """Options of `generate` under which no token is given a position that the table does not have.

    Args:
        language_model: whose `generation_config` stands in for what the options leave open.
        options: for `generate`.
        length: rows in front of the first new token.
        limit: of the position table; None for none.

    Returns:
        The options. Where neither they nor the model bound the new tokens, transformers' default is cut to
        the room there is.

    Raises:
        TypeError, ValueError: `max_new_tokens` or `max_length`, of the options or of a `generation_config`,
        is no number of tokens or more than there is room for.
    """
    options = dict(options)
    config = _generation_config(language_model, options)
    # The order in which transformers asks; its own default length of 20 counts as none.
    tokens, total = options.get("max_new_tokens"), options.get("max_length")
    if tokens is None:
        tokens = getattr(config, "max_new_tokens", None)
    if tokens is None and total is None and getattr(config, "max_length", None) != DEFAULT_NEW_TOKENS:
        total = getattr(config, "max_length", None)
    name, front = ("max_length", length) if tokens is None and total is not None else ("max_new_tokens", 0)
    wanted = total if name == "max_length" else tokens
    if wanted is not None:
        check_int(name, wanted, 1)
    if limit is None:
        return options
    room = limit - length + 1  # the last token of all is never read
    if wanted is None:
        if room < DEFAULT_NEW_TOKENS:
            options["max_new_tokens"] = room
    elif wanted - front > room:
        raise ValueError(
            f"{name}: expected at most {room + front} behind {length} rows of soft prompt and text (the "
            f"language model's position table holds {limit}), got {wanted}"
        )
    return options
