"""What a run leaves on the disk besides the figures: weights, the optimizer's moments, random generators,
rows."""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from .atomic import replaced_file
from .checkpoints import Checkpoint

CHECKPOINT_PREFIX = "checkpoint-"
HISTORY_FILE = "history.jsonl"
FROZEN_SAMPLES = 1024
"""Weights of each frozen parameter whose signs are looked at, about."""


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, detached: what a checkpoint holds. Shared ones appear once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def frozen_parts(model: nn.Module) -> dict[str, str]:
    """The parts of a model that are not trained, and so not in its checkpoints, as words that tell one from
    another: class, size and a hash over the signs of some weights.

    Signs are those of the training in any floating-point type: what was trained in bfloat16 may be loaded in
    fp32. A language model of billions of weights is told in a fraction of a second; one whose weights differ
    in a few places only may be missed. A part with quantised weights is left out: nothing of them can be
    compared.
    """
    found = {}
    for name, part in model.named_children():
        parameters = dict(part.named_parameters())
        if not parameters or any(p.requires_grad for p in parameters.values()):
            continue
        if all(p.is_floating_point() for p in parameters.values()):
            size = sum(p.numel() for p in parameters.values())
            kind = type(getattr(part, "_orig_mod", part)).__name__  # a compiled module is what it was
            found[name] = f"{kind} of {size:,} parameters, {_hash_of_signs(parameters)}"
    return found


def _hash_of_signs(parameters: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name.removeprefix('_orig_mod.')} {list(parameter.shape)}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            sample = flat[:: max(flat.numel() // FROZEN_SAMPLES, 1)]
            digest.update(sample.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_trainable_state(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint of this model's trainable parameters back in place.

    Raises:
        ValueError: names every frozen part that is not the one of the training (such as another language
            model, which speaks another soft prompt), and every parameter that is missing, unexpected or of
            another shape, all at once.
    """
    trained_with, here = checkpoint.metadata.get("frozen", {}), frozen_parts(model)
    problems = [
        f"{name}: expected that of the training, {part}, got {here[name]}"
        for name, part in trained_with.items()
        if here.get(name, part) != part
    ]
    state = checkpoint.state
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    problems += [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name}: expected {list(own[name].shape)}, got {list(value.shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    if problems:
        raise ValueError("checkpoint: does not fit this model: " + "; ".join(problems))
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def read_history(output_dir: str | Path) -> list[dict[str, float]]:
    """The rows of `history.jsonl` in a run's folder; a last line cut off by a killed process is left out."""
    path = Path(output_dir) / HISTORY_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {error.msg}") from error
    return rows


class HistoryFile:
    """Appends the rows of a run to `history.jsonl`, a few at a time.

    The file of an earlier run stays as it is until the first row of this one is written.

    Args:
        output_dir: the run's folder; `None` writes nothing.
        rows: what the file starts with: the rows of the run that is continued.
    """

    def __init__(self, output_dir: Path | None, rows: list[dict[str, float]]) -> None:
        self._folder, self._rows = output_dir, list(rows)
        self._waiting: list[dict[str, float]] = []
        self._file: TextIO | None = None
        self._flushed = time.perf_counter()

    def _begin(self, folder: Path) -> TextIO:
        path = folder / HISTORY_FILE
        with replaced_file(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in self._rows), encoding="utf-8")
        return open(path, "a", encoding="utf-8")

    def add(self, row: dict[str, float]) -> None:
        """Takes a row, which may still be completed until the next one; writes what has gathered in 2 s."""
        if self._folder is None:
            return
        if time.perf_counter() - self._flushed > 2.0:
            self.flush()
        self._waiting.append(row)

    def flush(self) -> None:
        if self._folder is not None and self._waiting:
            if self._file is None:
                self._file = self._begin(self._folder)
            self._file.writelines(json.dumps(row) + "\n" for row in self._waiting)
            self._file.flush()
        self._waiting.clear()
        self._flushed = time.perf_counter()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimizer's tensors, `<parameter>.<what>`, and of each group its rate and its parameters' names."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {
        f"{names[id(p)]}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    groups = [{"lr": g["lr"], "names": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    return tensors, groups


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    groups: list[dict[str, Any]],
) -> None:
    """Puts back what :func:`optimizer_state` returned.

    Raises:
        ValueError: the parameters are grouped in another way.
    """
    own = optimizer_state(optimizer, model)[1]
    if [group["names"] for group in own] != [group["names"] for group in groups]:
        raise ValueError(
            "resume_from: expected the parameter groups of this run (weight_decay_filter, "
            "learning_rate_multipliers, what is trainable), got others"
        )
    per_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        per_parameter.setdefault(name, {})[kind] = value
    state_groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(state_groups, groups, strict=True):
        group["lr"] = saved["lr"]
    names = [name for group in groups for name in group["names"]]
    state = {index: per_parameter[name] for index, name in enumerate(names) if name in per_parameter}
    optimizer.load_state_dict({"state": state, "param_groups": state_groups})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators of Python, NumPy and torch, as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "numpy": torch.tensor([position, has_gauss, *keys.tolist()]),
        "spares": torch.tensor([gauss is not None, gauss or 0.0, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    version, *words = state["python"].tolist()
    position, has_gauss, *keys = state["numpy"].tolist()
    has_spare, spare, cached = state["spares"].tolist()
    random.setstate((version, tuple(words), spare if has_spare else None))
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def remove_checkpoint(path: Path) -> None:
    """Takes a checkpoint away; it is renamed first, so that a half-removed one is never found."""
    doomed = path.with_name(f".{path.name}.removed")
    if path.exists():
        os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_run(folder: Path) -> None:
    """Takes the checkpoints and the history of an earlier run away, for a new one in its place."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir() and path.name.startswith(CHECKPOINT_PREFIX):
                remove_checkpoint(path)
        (folder / HISTORY_FILE).unlink(missing_ok=True)
