"""What `train` asks of its arguments before anything is touched: the model, the disk, the random numbers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2_kernels.checks import (
    check_bool,
    check_finite,
    check_folder,
    check_function,
    check_int,
    check_probability,
    describe,
)

from .checkpoints import latest_checkpoint
from .optimization import check_factors, check_schedule

# The least of each; None where the argument may be left out.
INTEGERS = {
    "max_steps": 1, "batch_size": 1, "warmup_steps": 0, "gradient_accumulation_steps": 1, "evaluate_every": 1,
    "save_every": 1, "keep_checkpoints": 1, "num_workers": 0,
}  # fmt: skip
NUMBERS = {
    "learning_rate": 0.0,
    "min_learning_rate": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "eps": 0.0,
}
OPTIONAL = ("max_steps", "batch_size", "evaluate_every", "save_every", "max_grad_norm")
SWITCHES = ("bf16", "save_final", "progress", "find_unused_parameters")
FUNCTIONS = ("collate", "step_function", "evaluate", "on_step")
MAX_SEED = 2**32 - 1  # NumPy's


def check_arguments(model: object, dataset: Any, given: Mapping[str, Any]) -> None:
    """Check the arguments of `train`: its model, its dataset and all others, by name.

    Raises:
        TypeError, ValueError: one of the wrong kind or value, or two that contradict each other.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not (hasattr(dataset, "__getitem__") or isinstance(dataset, torch.utils.data.IterableDataset)):
        raise TypeError(f"dataset: expected samples by index or an IterableDataset, got {describe(dataset)}")
    if (given["max_steps"] is None) == (given["epochs"] is None):
        raise ValueError(
            f"max_steps, epochs: expected exactly one of them, got {given['max_steps']} and {given['epochs']}"
        )
    if (given["batch_size"] is None) == (given["batch_sampler"] is None):
        raise ValueError(
            "batch_size, batch_sampler: expected exactly one of them, got "
            + (
                "neither"
                if given["batch_size"] is None
                else f"batch_size={given['batch_size']} and a sampler"
            )
        )
    for name, least in INTEGERS.items():
        if given[name] is not None or name not in OPTIONAL:
            check_int(name, given[name], least)
    for name, minimum in NUMBERS.items():
        if given[name] is not None or name not in OPTIONAL:
            check_finite(name, given[name], minimum)
    if given["epochs"] is not None:
        check_finite("epochs", given["epochs"], above=0)
    check_int("seed", given["seed"], 0, MAX_SEED)
    if given["min_learning_rate"] > given["learning_rate"]:
        raise ValueError(
            f"min_learning_rate: expected a value in [0, {given['learning_rate']}] (the learning rate), "
            f"got {given['min_learning_rate']}"
        )
    betas = given["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas: expected two numbers in [0, 1), got {betas!r}")
    for beta in betas:
        check_probability("betas", beta)
    for name in SWITCHES:
        check_bool(name, given[name])
    for name in FUNCTIONS:
        check_function(name, given[name])
    check_function("weight_decay_filter", given["weight_decay_filter"], optional=False)
    check_schedule(given["schedule"])
    if given["batch_sampler"] is not None and not isinstance(given["batch_sampler"], Iterable):
        raise TypeError(f"batch_sampler: expected lists of indices, got {describe(given['batch_sampler'])}")
    if not callable(given["loss_weights"]):
        check_factors("loss_weights", given["loss_weights"], "a function of the step or ")
    check_factors("learning_rate_multipliers", given["learning_rate_multipliers"], minimum=0.0)
    _check_callbacks(given["callbacks"])
    if not isinstance(given["description"], str):
        raise TypeError(f"description: expected a str, got {describe(given['description'])}")
    if given["device"] not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected None, 'cpu' or 'cuda', got {given['device']!r}")
    if given["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device that torch sees, got 'cuda' without one")
    _check_paths(given)


def _check_callbacks(callbacks: object) -> None:
    from transformers import TrainerCallback

    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise TypeError(f"callbacks: expected a sequence of TrainerCallback, got {describe(callbacks)}")
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise TypeError(
                f"callbacks: expected a sequence of TrainerCallback, got {describe(callback)} in it"
            )


def _check_paths(given: Mapping[str, Any]) -> None:
    for name in ("output_dir", "resume_from"):
        if given[name] is not None and not isinstance(given[name], str | Path):
            raise TypeError(f"{name}: expected a path or None, got {describe(given[name])}")
    output, resume = given["output_dir"], given["resume_from"]
    if given["save_every"] is not None and output is None:
        raise ValueError("save_every: expected an output_dir to save to, got None")
    if given["evaluate_every"] is not None and given["evaluate"] is None:
        raise ValueError("evaluate_every: expected a function `evaluate` to call, got None")
    if resume is not None and not Path(resume).is_dir():
        raise ValueError(f"resume_from: expected a checkpoint folder, got {str(resume)!r}")
    if output is None:
        return
    check_folder("output_dir", output)
    found = latest_checkpoint(output) if resume is None else None
    if found is not None:
        raise ValueError(
            "output_dir: expected a folder without checkpoints (or resume_from, --resume), got "
            f"{output} with {found.name}"
        )
