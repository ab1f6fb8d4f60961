"""What stage 2 asks of a language model."""

from typing import Any

from torch import nn

from blip2_kernels.checks import describe


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
