"""Training of both stages on transformers' `Trainer` (accelerate, torchrun).

`train(model, dataset, …)` is the whole interface. What it adds to the Trainer: the loss parts of every step
in the history, loss weights that change over the run, batches composed by the caller, a stop *before* the
optimizer step when the loss is not finite, and checkpoints that hold only what is trained and are never half
written.

    result = train(model, dataset, collate=collate, max_steps=1000, batch_size=64, output_dir="runs/stage1")
    result.history[-1]      # {"step": 1000, "loss": 3.1, "loss_itc": 0.4, …, "learning_rate": …}

Several GPUs: the same script under `torchrun --nproc-per-node=N`; `batch_size` is per rank.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2_kernels.checks import describe

from .optimization import Schedule, decays
from .train_arguments import check_arguments

LossWeights = Mapping[str, float] | Callable[[int], Mapping[str, float] | None]
StepFunction = Callable[[nn.Module, dict[str, Any], int], Any]


class NonFiniteLossError(RuntimeError):
    """The loss (or the gradient) became NaN or infinite and the optimizer did not take the step; or a step it
    took left parameters that are not finite, which are not saved.

    Attributes:
        step: the optimizer step, counted from 1.
        parts: the loss parts of that step, `loss` among them; `grad_norm` where that is what was not finite.
        last_checkpoint: the newest checkpoint of this run, `None` if there is none.
    """

    def __init__(
        self,
        step: int,
        parts: Mapping[str, float],
        last_checkpoint: Path | None,
        where: str = "before the optimizer step",
    ) -> None:
        self.step = step
        self.parts = dict(parts)
        self.last_checkpoint = last_checkpoint
        figures = ", ".join(f"{name} = {value:.6g}" for name, value in parts.items())
        checkpoint = last_checkpoint if last_checkpoint is not None else "none was written"
        super().__init__(
            f"training stopped at step {step}, {where}: {figures}; last good checkpoint: {checkpoint}"
        )


@dataclass
class TrainResult:
    """What a training run leaves behind.

    Attributes:
        history: one row a step: `step` (from 1), `loss` and its parts (means over the ranks),
            `learning_rate`, `grad_norm` (before clipping), `seconds`. A resumed run begins with the rows of
            the run it continues.
        evaluations: one row a call of `evaluate`: `step` and what it returned.
        checkpoints: folders written by this run and still there, oldest first.
        seconds: wall-clock time of this run, evaluations and checkpoints included.
        steps: steps taken in all, those before a resumption included.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0


def loss_parts(output: Any) -> dict[str, Tensor]:
    """The scalar losses of a model output: `loss` and every `loss_*`, from a mapping or a dataclass."""
    if isinstance(output, Mapping):
        items: Iterable[tuple[str, Any]] = output.items()
    elif is_dataclass(output):
        items = vars(output).items()
    else:
        raise TypeError(f"model output: expected a mapping or dataclass with a loss, got {describe(output)}")
    parts = {
        name: value
        for name, value in items
        if isinstance(value, Tensor) and value.ndim == 0 and (name == "loss" or name.startswith("loss_"))
    }
    if not parts:
        raise ValueError("model output: expected a scalar `loss` or `loss_*`, got none")
    return parts


def weighted_loss(
    parts: Mapping[str, Tensor], weights: Mapping[str, float] | None, keep_zero: bool = False
) -> Tensor:
    """Sum of the loss parts under `weights` (parts not named weigh nothing); `parts["loss"]` without weights.

    `keep_zero` keeps parts of weight 0 in the graph: with several ranks every parameter must take part in the
    backward pass of every rank; on a single one their backward pass is saved.
    """
    if weights is None:
        if "loss" not in parts:
            raise ValueError(f"model output: expected `loss` (or give loss_weights), got {sorted(parts)}")
        return parts["loss"]
    if not isinstance(weights, Mapping):
        raise TypeError(f"loss_weights: expected a mapping of names to numbers, got {describe(weights)}")
    if unknown := sorted(set(weights) - set(parts)):
        raise ValueError(f"loss_weights: expected names among {sorted(parts)}, got {unknown}")
    terms = [weight * parts[name] for name, weight in weights.items() if weight != 0]
    if not terms:
        raise ValueError(f"loss_weights: expected at least one weight other than 0, got {dict(weights)}")
    if keep_zero:
        terms += [0.0 * parts[name] for name in parts if name != "loss" and weights.get(name, 0.0) == 0]
    return torch.stack(terms).sum()


def train(
    model: nn.Module,
    dataset: Any,
    *,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    max_steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    batch_sampler: Iterable[Sequence[int]] | None = None,
    output_dir: str | Path | None = None,
    learning_rate: float = 1e-4,
    min_learning_rate: float = 0.0,
    warmup_steps: int = 0,
    schedule: str | Schedule = "cosine",
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    weight_decay_filter: Callable[[str, nn.Parameter], bool] = decays,
    learning_rate_multipliers: Mapping[str, float] | None = None,
    max_grad_norm: float | None = 1.0,
    gradient_accumulation_steps: int = 1,
    loss_weights: LossWeights | None = None,
    step_function: StepFunction | None = None,
    bf16: bool = False,
    seed: int = 0,
    device: str | None = None,
    num_workers: int = 0,
    evaluate: Callable[[nn.Module, int], Mapping[str, Any]] | None = None,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    save_final: bool = True,
    keep_checkpoints: int = 2,
    checkpoint_config: Mapping[str, Any] | None = None,
    resume_from: str | Path | None = None,
    on_step: Callable[[Mapping[str, float]], None] | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    description: str = "training",
    find_unused_parameters: bool = False,
) -> TrainResult:
    """Trains the parameters of `model` that have `requires_grad`, in place.

    Args:
        model: called as `model(**batch)`; its output is a mapping or dataclass with a scalar `loss`, and
            parts named `loss_*`. Frozen parts stay as they are and are not in checkpoints.
        dataset: map-style, or a `torch.utils.data.IterableDataset` (which deals its samples to the ranks
            itself).
        collate: list of samples → dict of arguments of the model; default PyTorch's own.
        max_steps, epochs: exactly one of them; a step is one optimizer step.
        batch_size: samples a rank and step (and accumulation step). Contrastive losses see what is in one
            forward pass: accumulation adds gradients, not negatives.
        batch_sampler: composes the batches instead (lists of indices; `set_epoch(epoch)` is called if it has
            it). It yields the same sequence on every rank; rank r of n takes batches r, r + n, …
        output_dir: checkpoints and `history.jsonl` go here; `None` writes nothing. It may hold no checkpoint
            of another run; a history without one is replaced with the first row.
        learning_rate, min_learning_rate, warmup_steps, schedule: see
            :func:`~blip2_kernels.model.optimization.learning_rate_factor`.
        betas, eps, weight_decay: of AdamW; the defaults are the paper's (section 3.4).
        weight_decay_filter: which parameters decay; default: matrices, but not the query tokens.
        learning_rate_multipliers: prefix of parameter names → factor on the learning rate.
        max_grad_norm: gradients are clipped to this norm; `None` or 0 does not clip (as in the paper).
        gradient_accumulation_steps: forward and backward passes a step.
        loss_weights: weight of each `loss_*`, or a function of the step (from 0) that gives them, e.g. a
            warm-up on ITC alone: `lambda step: {"loss_itc": 1.0} if step < 100 else None`. `None` uses the
            model's `loss`. The history's `loss` is what was optimised.
        step_function: `(model, batch, step) -> output` in place of `model(**batch)`, step from 0.
        bf16: forward pass under autocast to bfloat16; parameters and optimizer stay as they are.
        seed: of the order of samples and of the global random generators (`random`, NumPy, torch), which are
            seeded at the start; ranks draw different dropout masks.
        device: `"cpu"` or `"cuda"`; default: the GPU where torch sees one (under torchrun, that of the rank).
        num_workers: processes that load data.
        evaluate: `(model, step) -> figures`, called in eval mode without gradients, every `evaluate_every`
            steps and after the last one; it does not disturb the random numbers of training.
        save_every: steps between checkpoints; `save_final` writes one at the end. Both need `output_dir`.
        keep_checkpoints: how many of the newest to keep.
        checkpoint_config: stored in checkpoints; default `model.config.to_dict()` where there is one.
        resume_from: a checkpoint folder of an earlier run with the same arguments (see
            :func:`~blip2_kernels.model.checkpoints.latest_checkpoint`) and continues to the same numbers the
            uninterrupted run would have had.
        on_step: called with each new row of the history on rank 0. The row of a CUDA step gets its
            `grad_norm` one step later, so that the host need not wait for the backward pass.
        callbacks: transformers' `TrainerCallback`s.
        progress: show a bar (or lines) on rank 0. `description` is its title.
        find_unused_parameters: of DistributedDataParallel: needed if some trainable parameter takes no part
            in some step.

    Returns:
        :class:`TrainResult`.

    Raises:
        NonFiniteLossError: the loss or the gradient norm is NaN or infinite. The parameters stay as they were
            before the step. (On CUDA a bad gradient under a good loss is reported one step later.)
        ImportError: accelerate is missing.
        TypeError, ValueError: arguments of the wrong kind or value, or that contradict each other; an
            `output_dir` with the checkpoints of another run, or that may not be written; a checkpoint to
            resume from whose parameters or frozen parts (another language model) are not this model's.
            Nothing on the disk has changed then.
        OSError: the disk is full, or the like; the checkpoints written before are whole.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("model", "dataset")}
    check_arguments(model, dataset, arguments)
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("training needs accelerate: pip install 'blip2-kernels[train]'")

    from .trainer import Settings, run

    return run(
        model,
        dataset,
        Settings(
            **{
                **arguments,
                "output_dir": Path(output_dir) if output_dir is not None else None,
                "resume_from": Path(resume_from) if resume_from is not None else None,
                "max_grad_norm": max_grad_norm or 0.0,
                "save_final": save_final and output_dir is not None,
                "callbacks": tuple(callbacks),
            }
        ),
    )
