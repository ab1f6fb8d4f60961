"""Training on two ranks, through torchrun as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import QUIET, samples, toy, weights

from blip2_kernels.model.checkpoints import load_checkpoint
from blip2_kernels.model.train import train

RANK_SCRIPT = """
import sys, json, torch
sys.path[:0] = {path!r}
from test_train import QUIET, samples, toy, weights, train
import test_train
model = toy(dropout={dropout})
batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
result = train(
    model, samples(), max_steps={steps}, batch_sampler=batches, output_dir={folder!r}, save_every=1,
    loss_weights=lambda step: {{"loss_fit": 1.0}} if step == 0 else None, resume_from={resume!r}, **QUIET,
)
rank = torch.distributed.get_rank()
saved = {{"weights": weights(model), "history": result.history, "calls": model.calls}}
torch.save(saved, {folder!r} + f"/{{rank}}.pt")
# A process that ends with its group alive may find a thread of it running, and abort.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_ranks(folder: Path, *, dropout: float = 0.0, steps: int = 2, resume: str | None = None) -> list[dict]:
    script = folder / "script.py"
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(
        RANK_SCRIPT.format(path=path, folder=str(folder), dropout=dropout, steps=steps, resume=resume)
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_ranks_are_one_rank_with_both_batches(tmp_path):
    ranks = run_ranks(tmp_path)
    alone = toy(dropout=0.0)
    batches = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
    expected = train(
        alone, samples(), max_steps=2, batch_sampler=batches,
        loss_weights=lambda step: {"loss_fit": 1.0} if step == 0 else None, **QUIET,
    )  # fmt: skip
    assert ranks[0]["calls"] == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert ranks[1]["calls"] == [[4, 5, 6, 7], [12, 13, 14, 15]]
    for rank in ranks:
        torch.testing.assert_close(rank["weights"], weights(alone), rtol=1e-5, atol=1e-6)
        for row, wanted in zip(rank["history"], expected.history, strict=True):
            for name in ("loss", "loss_fit", "loss_size", "learning_rate"):
                assert row[name] == pytest.approx(wanted[name], rel=1e-5), name
    checkpoint = load_checkpoint(tmp_path / "checkpoint-2")
    assert {name.split(".")[0] for name in checkpoint.extra["random"]} == {"0", "1"}
    assert not torch.equal(checkpoint.extra["random"]["0.torch"], checkpoint.extra["random"]["1.torch"])


FAULT_SCRIPT = """
import sys, json, pathlib, torch
sys.path[:0] = {path!r}
from test_train import QUIET, samples, toy, train
from blip2_kernels.model.train import NonFiniteLossError
import os
model = toy()
if os.environ["RANK"] == "0":
    model.fault = {{"call": 2, "factor": float("nan")}}
try:
    train(model, samples(), max_steps=4, batch_size=2, max_grad_norm={clip!r}, **QUIET)
    said = "went on"
except NonFiniteLossError as error:
    said = f"{{error.step}} {{len(model.calls)}} {{error}}"
pathlib.Path({folder!r}, os.environ["RANK"]).write_text(said)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_both_at_that_step(tmp_path, clip):
    script = tmp_path / "script.py"
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(FAULT_SCRIPT.format(path=path, folder=str(tmp_path), clip=clip))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert first.startswith("2 2 training stopped at step 2, before the optimizer step: loss = nan"), first
    assert second.startswith("2 2 training stopped at step 2, before the optimizer step, since a loss of "), (
        second
    )
    assert "another rank" in second and "nan" not in second
