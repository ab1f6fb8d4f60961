"""Models trained in turn, a step of each, so that their losses and times can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..optimization import learning_rate_factor, parameter_groups
from ..train import loss_parts

Rows = list[dict[str, float]]


class Learner:
    """A model that is trained as `train` trains it, one step at a time.

    Args:
        model: trained in place; floating-point arguments get the dtype of its parameters.
        learning_rate: after the warm-up.
        warmup_steps: of a linear warm-up.
        autocast: run the forward pass under autocast to bfloat16.
        learning_rate_multipliers: prefix of parameter names → factor on the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        warmup_steps: int = 0,
        autocast: bool = False,
        learning_rate_multipliers: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.autocast = model.train(), autocast
        weight = next(p for p in model.parameters() if p.requires_grad)
        self.device, self.dtype = weight.device, weight.dtype
        groups = parameter_groups(
            model,
            learning_rate=learning_rate,
            weight_decay=0.05,
            learning_rate_multipliers=learning_rate_multipliers,
        )
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        factor = partial(learning_rate_factor, total_steps=0, warmup_steps=warmup_steps, schedule="constant")
        self.schedule = LambdaLR(self.optimizer, factor)

    def step(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Any, dict[str, float]]:
        """One step; the model's output, and its losses (`loss`, `loss_*`) and `seconds`."""
        batch = {name: self._in_own_dtype(value) for name, value in batch.items()}
        begin = self._now()
        torch.manual_seed(seed)  # of the dropout key and of what is drawn
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(**batch)
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        seconds = self._now() - begin
        losses = {name: value.item() for name, value in loss_parts(output).items()}
        return output, {**losses, "seconds": seconds}

    def _in_own_dtype(self, value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floats else value

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def train_in_turn(
    learners: Mapping[str, Learner],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Rows]:
    """A step of each learner, then the next step of each.

    Hard negatives are drawn by the first and given to the others: a draw turns a difference of rounding into
    another pair of image and text, once in many thousands.

    Args:
        learners: by name, from equal weights.
        batches: arguments of their models.
        seed: of the dropout masks and draws, together with the step.
        on_step: called with the number of steps that all have taken.

    Returns:
        For each learner a row a step, as `Learner.step` gives it.
    """
    curves: dict[str, Rows] = {name: [] for name in learners}
    for step, given in enumerate(batches):
        batch = dict(given)
        for name, learner in learners.items():
            output, row = learner.step(batch, (seed << 20) + step)
            curves[name].append(row)
            if getattr(output, "negatives", None) is not None:
                batch["negatives"] = output.negatives
        on_step(step + 1)
    return curves


def largest_difference(rows: Rows, reference: Rows, steps: int) -> float:
    """Of any loss in the first steps, relative to the reference's; NaN if a loss is."""
    names = [name for name in reference[0] if name.startswith("loss")]
    ours, theirs = (np.array([[row[name] for name in names] for row in r[:steps]]) for r in (rows, reference))
    return float((abs(ours - theirs) / abs(theirs)).max())


def summarise(
    curves: Mapping[str, Rows], references: Mapping[str, str], compared: int
) -> dict[str, dict[str, Any]]:
    """What each learner came to.

    Args:
        curves: of `train_in_turn`.
        references: whom a learner is compared with; itself where it is not named.
        compared: first steps in which losses are.

    Returns:
        Of each: its `curve`, the `largest_difference` of a loss from the reference's in the first steps,
        median `seconds_a_step`, and how many `times_as_fast` as the reference it is.
    """
    seconds = {name: statistics.median(row["seconds"] for row in rows) for name, rows in curves.items()}
    reference = {name: references.get(name, name) for name in curves}
    return {
        name: {
            "largest_difference": largest_difference(rows, curves[reference[name]], compared),
            "seconds_a_step": seconds[name],
            "times_as_fast": seconds[reference[name]] / seconds[name],
            "curve": rows,
        }
        for name, rows in curves.items()
    }
