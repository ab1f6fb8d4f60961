"""One step as a module, and how its figures reach the host without holding up the device."""

from typing import Any

import torch
from torch import Tensor, nn

from .train import LossWeights, StepFunction, loss_parts, weighted_loss


class TrainingStep(nn.Module):
    """A model and its weighted loss as one module, so that several ranks synchronise whatever the step
    computes.

    It also keeps the Trainer away from `model.config`, which is ours.
    """

    def __init__(
        self, model: nn.Module, step_function: StepFunction | None, loss_weights: LossWeights | None
    ) -> None:
        super().__init__()
        self.model, self.step_function, self.loss_weights = model, step_function, loss_weights

    def forward(self, batch: dict[str, Any], step: int, keep_zero: bool) -> tuple[Tensor, Tensor, list[str]]:
        """The loss, the detached parts fp32 [parts] (the loss first) and their names."""
        if self.step_function is not None:
            output = self.step_function(self.model, batch, step)
        else:
            output = self.model(**batch)
        parts = loss_parts(output)
        weights = self.loss_weights(step) if callable(self.loss_weights) else self.loss_weights
        loss = weighted_loss(parts, weights, keep_zero)
        names = [name for name in parts if name != "loss"]
        figures = [loss, *(parts[name] for name in names)]
        return loss, torch.stack([figure.detach().float() for figure in figures]), names


def reads_late(device: torch.device) -> bool:
    """Whether what is computed on a device is read one step later, so that the host need not wait for it."""
    return device.type == "cuda"


class Readback:
    """Device figures on their way to the host, without holding up what is launched after them."""

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
