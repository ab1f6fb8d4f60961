"""What the optimizer is told: which parameters decay, and how the learning rate moves.

The paper (section 3.4, "Pre-training settings") uses AdamW with betas (0.9, 0.98), weight decay 0.05, a
linear warm-up of 2,000 steps to 1e-4 and a cosine decay, which ends at 5e-5 in the second stage.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from blip2_kernels.checks import check_finite, check_function, check_int, describe

Schedule = Callable[[int, int], float]

SCHEDULES = ("cosine", "linear", "constant")


def check_schedule(schedule: object) -> None:
    """Check a schedule of the learning rate: one of `SCHEDULES` or a function; raises ValueError."""
    if not callable(schedule) and schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES} or a function, got {schedule!r}")


def check_factors(name: str, factors: object, other: str = "", minimum: float | None = None) -> None:
    """Check None, or a mapping of names to finite numbers; raises TypeError or ValueError."""
    if factors is None:
        return
    if not isinstance(factors, Mapping):
        raise TypeError(f"{name}: expected {other}a mapping of names to numbers, got {describe(factors)}")
    for key, value in factors.items():
        check_finite(f"{name}[{key!r}]", value, minimum)


def learning_rate_factor(
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    schedule: str | Schedule = "cosine",
    final_factor: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of the peak.

    A linear warm-up reaches 1 at step `warmup_steps` (the first step already moves: 1 / (warmup_steps + 1));
    then `schedule` takes over:

    - `"cosine"`: half a cosine from 1 to `final_factor`, reached at `total_steps`.
    - `"linear"`: a straight line between the same two points.
    - `"constant"`: stays at 1.
    - a function of (steps since the warm-up, steps after the warm-up in all): its value is used as it is.

    Raises:
        TypeError, ValueError: a step, a number of steps or a factor below 0, or another schedule.
    """
    check_int("step", step, 0)
    check_int("total_steps", total_steps, 0)
    check_int("warmup_steps", warmup_steps, 0)
    check_finite("final_factor", final_factor, 0.0)
    check_schedule(schedule)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done, length = step - warmup_steps, max(total_steps - warmup_steps, 1)
    if callable(schedule):
        factor = schedule(done, length)
        if isinstance(factor, bool) or not isinstance(factor, int | float):  # a NaN stops the training itself
            raise TypeError(f"schedule: expected a function that returns a number, got {describe(factor)}")
        return factor
    progress = min(done / length, 1.0)
    if schedule == "cosine":
        return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1.0 + (final_factor - 1.0) * progress
    return 1.0


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices only, and not to the query tokens.

    Biases, LayerNorm weights and the temperature are vectors or scalars and do not decay, as in LAVIS. LAVIS
    does decay the query tokens; here they are left alone, because they are learned inputs rather than weights
    of a map (pass `weight_decay_filter` to :func:`~blip2_kernels.model.train.train` to have it LAVIS's way).
    """
    return parameter.ndim >= 2 and not name.endswith("query_tokens")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    weight_decay_filter: Callable[[str, nn.Parameter], bool] = decays,
    learning_rate_multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups of trainable parameters for `torch.optim.AdamW`; frozen ones are not in any.

    Args:
        learning_rate: peak learning rate.
        weight_decay: decay of the parameters for which `weight_decay_filter(name, parameter)` holds.
        learning_rate_multipliers: prefix of parameter names → factor on the learning rate; the longest prefix
            that fits counts, others keep 1.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a number out of range; nothing is trainable, or a prefix fits no trainable parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    check_finite("learning_rate", learning_rate, 0)
    check_finite("weight_decay", weight_decay, 0)
    check_function("weight_decay_filter", weight_decay_filter, optional=False)
    check_factors("learning_rate_multipliers", learning_rate_multipliers, minimum=0)
    multipliers = dict(learning_rate_multipliers or {})
    used: set[str] = set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        fitting = [prefix for prefix in multipliers if name.startswith(prefix)]
        used.update(fitting)
        factor = multipliers[max(fitting, key=len)] if fitting else 1.0
        decay = weight_decay if weight_decay_filter(name, parameter) else 0.0
        groups.setdefault((learning_rate * factor, decay), []).append(parameter)
    if not groups:
        raise ValueError("model: expected at least one parameter with requires_grad, got none")
    if unused := sorted(set(multipliers) - used):
        raise ValueError(f"learning_rate_multipliers: expected prefixes of trained parameters, got {unused}")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
