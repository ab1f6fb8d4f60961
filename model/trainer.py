"""The `Trainer` behind :func:`~blip2_kernels.model.train.train`; imported only when training starts.

What is overridden and why: the loss (parts, weights, read back without waiting for the backward pass), the
batches (composed by us, dealt to ranks), the optimizer (paper's groups), and saving and loading (one folder
that is written whole, holds only what is trained, and is checked before it is used).
"""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from blip2_kernels.checks import describe

from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from .data.batches import DeviceLoader, RankBatches, ShuffledBatches, SizedRankBatches
from .optimization import Schedule, learning_rate_factor, parameter_groups
from .progress import ProgressBar
from .train import LossWeights, NonFiniteLossError, StepFunction, TrainResult
from .training_state import (
    CHECKPOINT_PREFIX,
    HistoryFile,
    frozen_parts,
    load_optimizer_state,
    load_trainable_state,
    optimizer_state,
    random_state,
    read_history,
    remove_checkpoint,
    set_random_state,
    trainable_state,
)
from .training_step import Readback, TrainingStep, reads_late


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `train()`, checked."""

    collate: Callable[[list[Any]], dict[str, Any]] | None
    max_steps: int | None
    epochs: float | None
    batch_size: int | None
    batch_sampler: Iterable[Sequence[int]] | None
    output_dir: Path | None
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    schedule: str | Schedule
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    weight_decay_filter: Callable[[str, nn.Parameter], bool]
    learning_rate_multipliers: Mapping[str, float] | None
    max_grad_norm: float
    gradient_accumulation_steps: int
    loss_weights: LossWeights | None
    step_function: StepFunction | None
    bf16: bool
    seed: int
    device: str | None
    num_workers: int
    evaluate: Callable[[nn.Module, int], Mapping[str, Any]] | None
    evaluate_every: int | None
    save_every: int | None
    save_final: bool
    keep_checkpoints: int
    checkpoint_config: Mapping[str, Any] | None
    resume_from: Path | None
    on_step: Callable[[Mapping[str, float]], None] | None
    callbacks: tuple[Any, ...]
    progress: bool
    description: str
    find_unused_parameters: bool


class Blip2Trainer(Trainer):
    """See the module's description."""

    def __init__(
        self, model: nn.Module, dataset: Any, settings: Settings, arguments: TrainingArguments
    ) -> None:
        self.settings = settings
        self.result = TrainResult()
        self.names: list[str] = []
        self.micro_batches: list[Readback] = []
        self.late_grad_norm: tuple[dict[str, float], Readback] | None = None
        self.last_checkpoint = settings.resume_from
        self.resumed: Checkpoint | None = None
        self.config = _checkpoint_config(model, settings)
        self.history_file: HistoryFile
        self.adamw: torch.optim.AdamW
        self.factor: Callable[[int], float]
        self.optimizer: Any
        self.lr_scheduler: Any
        self._grad_norm: Any = None
        super().__init__(
            model=TrainingStep(model, settings.step_function, settings.loss_weights),
            args=arguments,
            train_dataset=dataset,
            data_collator=settings.collate or default_collate,
            callbacks=[*settings.callbacks],
        )
        self.trained = model
        self.model_accepts_loss_kwargs = False  # how a loss is normalised is the model's business
        self.remove_callback(PrinterCallback)

    # --- batches ---

    def get_train_dataloader(self) -> DataLoader:
        settings, args = self.settings, self.args
        options: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": settings.num_workers,
            "pin_memory": args.device.type == "cuda",
            "persistent_workers": settings.num_workers > 0,
        }
        self.batches: RankBatches | None = None
        if isinstance(self.train_dataset, IterableDataset):
            if settings.batch_sampler is not None:
                raise ValueError("batch_sampler: expected None with an IterableDataset, which has no indices")
            options |= {"batch_size": settings.batch_size, "drop_last": True}
        else:
            batches: Any = settings.batch_sampler
            if batches is None:
                batches = ShuffledBatches(
                    len(self.train_dataset), settings.batch_size or 1, seed=settings.seed
                )
            wrapper = SizedRankBatches if hasattr(batches, "__len__") else RankBatches
            self.batches = wrapper(batches, args.process_index, args.world_size)
            if hasattr(batches, "__len__") and not len(self.batches):
                raise ValueError(
                    f"dataset: expected at least {args.world_size} batches, one a rank, got {len(batches)}"
                )
            options["batch_sampler"] = self.batches
        loader = DeviceLoader(self.train_dataset, **options)
        loader.target = args.device
        return loader

    def set_epoch(self, epoch: int) -> None:
        if self.batches is not None:
            self.batches.set_epoch(epoch)
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(epoch)

    # --- optimizer ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            settings = self.settings
            groups = parameter_groups(
                self.trained,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                weight_decay_filter=settings.weight_decay_filter,
                learning_rate_multipliers=settings.learning_rate_multipliers,
            )
            fused: bool = self.args.device.type in ("cpu", "cuda")  # elsewhere torch may not have it
            self.adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=fused)
            self.optimizer = self.adamw
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        if self.lr_scheduler is None:
            settings = self.settings
            final = settings.min_learning_rate / settings.learning_rate if settings.learning_rate else 0.0

            def factor(step: int) -> float:
                return learning_rate_factor(
                    step,
                    num_training_steps,
                    warmup_steps=settings.warmup_steps,
                    schedule=settings.schedule,
                    final_factor=final,
                )

            self.factor = factor
            self.lr_scheduler = LambdaLR(self.adamw, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- the loss ---

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, parts, self.names = model(inputs, self.state.global_step, self.args.world_size > 1)
        self.micro_batches.append(Readback(self._with_faults(parts)))
        return (loss, {"parts": parts}) if return_outputs else loss

    def _with_faults(self, parts: Tensor) -> Tensor:
        """The parts [P] and behind them how many ranks have one that is not finite, so that all stop at the
        same step and none waits for a rank that has. Sent off before the backward pass, which it does not
        wait for."""
        faults = (~parts.isfinite()).any().float().reshape(1)
        if self.args.world_size > 1:
            dist.all_reduce(faults)
        return torch.cat([parts, faults])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._grad_norm

    def finish_backward(self) -> None:
        """Reads the loss parts of the step that is about to be taken; refuses it if they are not finite."""
        step = self.state.global_step + 1
        read = [readback.read() for readback in self.micro_batches]
        self.micro_batches.clear()
        *means, faults = [sum(values) / len(read) for values in zip(*read, strict=True)]
        row: dict[str, float] = {"step": step, **dict(zip(["loss", *self.names], means, strict=True))}
        row["learning_rate"] = self.settings.learning_rate * self.factor(step - 1)
        self.read_late_grad_norm()
        self.refuse_nonfinite(row, ["loss", *self.names])
        if faults:
            parts = {name: row[name] for name in ["loss", *self.names]}
            where = "before the optimizer step, since a loss of another rank is not finite"
            raise NonFiniteLossError(step, parts, self.last_checkpoint, where)
        norm = self._grad_norm
        if isinstance(norm, Tensor) and reads_late(norm.device):
            # The host does not wait for the backward pass: the fused optimizer leaves everything as it is
            # where `found_inf` is 1, and the figure is looked at one step later.
            self.adamw.found_inf = (~norm.detach().isfinite()).float()
            self.late_grad_norm = (row, Readback(norm.detach().reshape(1)))
        elif norm is not None:
            row["grad_norm"] = float(norm)
            self.refuse_nonfinite(row, ["grad_norm"])
        self.row = row

    def read_late_grad_norm(self) -> None:
        if self.late_grad_norm is not None:
            (row, readback), self.late_grad_norm = self.late_grad_norm, None
            row["grad_norm"] = readback.read()[0]
            self.refuse_nonfinite(row, ["grad_norm"])

    def refuse_nonfinite(self, row: Mapping[str, float], names: list[str]) -> None:
        if not all(np.isfinite(row[name]) for name in names):
            parts = {n: v for n, v in row.items() if n.startswith("loss") or n == "grad_norm"}
            raise NonFiniteLossError(int(row["step"]), parts, self.last_checkpoint)

    def refuse_nonfinite_parameters(self) -> None:
        """A good loss may be followed by a bad step, such as one at a learning rate that is NaN."""
        wrong = [name for name, p in trainable_state(self.trained).items() if not bool(p.isfinite().all())]
        if wrong and self.result.history:
            row = self.result.history[-1]
            parts = {n: v for n, v in row.items() if n.startswith("loss")}
            where = f"after an optimizer step that left {', '.join(wrong)} not finite"
            raise NonFiniteLossError(int(row["step"]), parts, self.last_checkpoint, where)

    # --- saving ---

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.read_late_grad_norm()
        self.refuse_nonfinite_parameters()
        if self.settings.output_dir is None:
            return
        path = self.settings.output_dir / f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        random_states: list[Any] = [random_state(self.args.device)]
        if self.args.world_size > 1:
            mine, random_states = random_states[0], [None] * self.args.world_size
            dist.all_gather_object(random_states, mine)
        if self.is_world_process_zero():
            tensors, groups = optimizer_state(self.adamw, self.trained)
            generators = {f"{r}.{n}": v for r, state in enumerate(random_states) for n, v in state.items()}
            with tempfile.TemporaryDirectory() as folder:
                self.state.save_to_json(os.path.join(folder, "state.json"))
                state = json.loads(Path(folder, "state.json").read_text())
            save_checkpoint(
                path,
                trainable_state(self.trained),
                config=self.config,
                metadata={
                    "step": self.state.global_step,
                    "model": type(self.trained).__name__,
                    "frozen": frozen_parts(self.trained),
                    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                    "training": {
                        "trainer_state": state,
                        "parameter_groups": groups,
                        "schedule": {
                            k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"
                        },
                    },
                },
                extra={"optimizer": tensors, "random": generators},
            )
            self.history_file.flush()
        if self.args.world_size > 1:
            dist.barrier()
        self.last_checkpoint = path
        self.result.checkpoints = [p for p in self.result.checkpoints if p != path] + [path]
        for old in self.result.checkpoints[: -self.settings.keep_checkpoints]:
            if self.is_world_process_zero():
                remove_checkpoint(old)
        self.result.checkpoints = self.result.checkpoints[-self.settings.keep_checkpoints :]

    # --- resuming ---

    def load(self, path: Path) -> str:
        """Puts the weights of a checkpoint in place; returns a folder with the Trainer's own state."""
        checkpoint = load_checkpoint(path)
        training = checkpoint.metadata.get("training")
        if not isinstance(training, dict) or set(checkpoint.extra) != {"optimizer", "random"}:
            raise ValueError(f"resume_from: expected a checkpoint with the state of its training, got {path}")
        done, wanted = training["trainer_state"]["global_step"], self.settings.max_steps
        if wanted is not None and done >= wanted:
            raise ValueError(f"max_steps: expected more than the {done} steps of {path}, got {wanted}")
        load_trainable_state(self.trained, checkpoint)
        self.resumed = checkpoint
        self._folder = tempfile.TemporaryDirectory()
        state = json.dumps(training["trainer_state"])
        Path(self._folder.name, "trainer_state.json").write_text(state, encoding="utf-8")
        self.result.history = [row for row in read_history(path.parent) if row["step"] <= done]
        return self._folder.name

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing left to do: `load` put the weights in place."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            return
        training = self.resumed.metadata["training"]
        groups = training["parameter_groups"]
        load_optimizer_state(self.adamw, self.trained, self.resumed.extra["optimizer"], groups)
        self.lr_scheduler.load_state_dict({**training["schedule"], "lr_lambdas": [None] * len(groups)})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resumed is None:
            return
        prefix = f"{self.args.process_index}."
        saved = self.resumed.extra["random"]
        state = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
        if state:  # a run continued on more ranks has none for the new ones: they keep their seed
            set_random_state(state, self.args.device)


class StepCallback(TrainerCallback):
    """Ties the Trainer's events to the history, the progress bar and the caller's hooks."""

    def __init__(self, trainer: Blip2Trainer, bar: ProgressBar) -> None:
        self.trainer, self.bar = trainer, bar
        self.last_saved = self.last_evaluated = -1
        self.clock = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.total = state.max_steps
        self.bar.start(state.global_step)
        self.clock = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.finish_backward()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, settings, row = self.trainer, self.trainer.settings, self.trainer.row
        now = time.perf_counter()
        row["seconds"] = now - self.clock
        trainer.result.history.append(row)
        if settings.on_step is not None and trainer.is_world_process_zero():
            settings.on_step(row)
        self.bar.update(state.global_step, _figures(row))
        if settings.evaluate_every is not None and state.global_step % settings.evaluate_every == 0:
            self.evaluate(state.global_step)
        if settings.save_every is not None and state.global_step % settings.save_every == 0:
            control.should_save = True
        trainer.history_file.add(row)
        self.clock = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_saved = state.global_step
        self.clock = time.perf_counter()

    def evaluate(self, step: int) -> None:
        """Calls the caller's evaluation; the random numbers of training go on as if it had not happened."""
        settings, model = self.trainer.settings, self.trainer.trained
        if settings.evaluate is None or step == self.last_evaluated:
            return
        self.last_evaluated = step
        model.eval()
        devices = [self.trainer.args.device] if self.trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            figures = settings.evaluate(model, step)
        if not isinstance(figures, Mapping):
            raise TypeError(
                f"evaluate: expected a function that returns a mapping of figures, got {describe(figures)}"
            )
        self.trainer.result.evaluations.append({"step": step, **figures})
        shown = ", ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, int | float))
        self.bar.write(f"{self.bar.description}: step {step}: {shown}")


def run(model: nn.Module, dataset: Any, settings: Settings) -> TrainResult:
    """Trains; the arguments have been checked."""
    started = time.perf_counter()
    on_cpu = settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,  # the Trainer itself writes nothing
            max_steps=settings.max_steps if settings.max_steps is not None else -1,
            num_train_epochs=settings.epochs if settings.epochs is not None else 1.0,
            per_device_train_batch_size=settings.batch_size or 1,  # our loader makes the batches
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=settings.learning_rate,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.bf16,
            seed=settings.seed,
            use_cpu=on_cpu,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            logging_nan_inf_filter=False,  # reads the loss back every step; ours does so without waiting
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            ddp_find_unused_parameters=settings.find_unused_parameters,
        )
        if arguments.n_gpu > 1:
            # torch.nn.DataParallel would cut a contrastive batch into pieces; several GPUs are torchrun's.
            arguments._n_gpu = 1
        trainer = Blip2Trainer(model, dataset, settings, arguments)
        bar = ProgressBar(settings.description, enabled=settings.progress and trainer.is_world_process_zero())
        events = StepCallback(trainer, bar)
        trainer.add_callback(events)
        if arguments.world_size > 1:
            torch.manual_seed(settings.seed + arguments.process_index)
        folder = trainer.load(settings.resume_from) if settings.resume_from is not None else None
        was_training = model.training
        mine = settings.output_dir if trainer.is_world_process_zero() else None
        trainer.history_file = HistoryFile(mine, trainer.result.history)
        try:
            trainer.train(resume_from_checkpoint=folder)
            trainer.read_late_grad_norm()
            trainer.refuse_nonfinite_parameters()
            events.evaluate(trainer.state.global_step)
            if settings.save_final and events.last_saved != trainer.state.global_step:
                trainer._save_checkpoint(trainer.model, None)
        finally:
            bar.close()
            trainer.history_file.close()
            model.train(was_training)
            for parameter in model.parameters():
                parameter.grad = None
        result = trainer.result
        if arguments.world_size > 1:
            _average_over_ranks(result.history, arguments.device)
    result.steps = trainer.state.global_step
    result.seconds = time.perf_counter() - started
    return result


def _checkpoint_config(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """What checkpoints say about the model; asked for at the start, so that a fault costs no training."""
    config = settings.checkpoint_config
    if config is None:
        own = getattr(model, "config", None)
        config = own.to_dict() if hasattr(own, "to_dict") else {}
    try:
        return json.loads(json.dumps(config))  # keys become strings, tuples lists, as they will come back
    except (TypeError, ValueError) as error:
        raise TypeError(f"checkpoint_config: expected what JSON can hold: {error}") from error


def _figures(row: Mapping[str, float]) -> str:
    """`loss 3.21 (itc 1.20, itm 0.61, itg 1.40)`."""
    parts = ", ".join(f"{n.removeprefix('loss_')} {v:.3f}" for n, v in row.items() if n.startswith("loss_"))
    return f"loss {row['loss']:.3f}" + (f" ({parts})" if parts else "")


def _average_over_ranks(history: list[dict[str, float]], device: torch.device) -> None:
    """Means of the loss parts over the ranks, in one go at the end instead of one exchange a step."""
    names = sorted({name for row in history for name in row if name.startswith("loss")})
    if not names:
        return
    table = torch.tensor([[row.get(name, 0.0) for name in names] for row in history], dtype=torch.float64)
    table = table.to(device) / dist.get_world_size()
    dist.all_reduce(table)
    for row, values in zip(history, table.tolist(), strict=True):
        row.update({name: value for name, value in zip(names, values, strict=True) if name in row})
