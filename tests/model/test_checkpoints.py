"""Checkpoints: what is saved comes back, damage is refused, and nothing is ever written half."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from blip2_kernels.model import atomic, checkpoints
from blip2_kernels.model.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    save_checkpoint,
)

CONFIG = {"hidden_size": 8, "layers": [1, 2], "name": "tiny"}


class TiedModel(nn.Module):
    """A head tied to its embedding, a buffer of integers, a half-precision weight and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight
        self.brief = nn.Parameter(torch.randn(3).bfloat16())
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.register_buffer("positions", torch.arange(5))


def save_tiny(path: Path, value: float = 1.0) -> Path:
    return save_checkpoint(path, {"w": torch.full((4,), value)}, config=CONFIG, metadata={"step": value})


def value_of(path: Path) -> float:
    checkpoint = load_checkpoint(path)
    value = checkpoint.state["w"][0].item()
    assert checkpoint.state["w"].tolist() == [value] * 4 and checkpoint.metadata == {"step": value}
    return value


def test_round_trip_restores_every_bit_and_the_ties(tmp_path):
    model, other = TiedModel(), TiedModel()
    extra = {"optimizer": {"exp_avg": torch.randn(8, 8, dtype=torch.float64)}}
    path = save_checkpoint(
        tmp_path / "runs" / "step-1", model.state_dict(), config=CONFIG, metadata={"step": 1}, extra=extra
    )
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == CONFIG and checkpoint.metadata == {"step": 1} and checkpoint.path == path
    assert list(checkpoint.extra) == ["optimizer"]
    assert torch.equal(checkpoint.extra["optimizer"]["exp_avg"], extra["optimizer"]["exp_avg"])
    assert checkpoint.state["head.weight"] is checkpoint.state["embedding.weight"]
    stored = safetensors.torch.load_file(path / "model.safetensors")
    assert "head.weight" not in stored, "a tied weight is stored once"

    report = load_into(other, checkpoint.state)
    assert report.missing == report.unexpected == ()
    assert other.head.weight is other.embedding.weight
    for name, value in model.state_dict().items():
        loaded = other.state_dict()[name]
        assert loaded.dtype == value.dtype and torch.equal(loaded, value), name


def test_views_of_one_buffer_are_saved_apart(tmp_path):
    fused = torch.randn(3, 4, 4)
    state = {"q": fused[0], "k": fused[1], "v": fused[2].T, "all": fused, "flat": fused.view(-1)}
    loaded = load_checkpoint(save_checkpoint(tmp_path / "c", state, config={})).state
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert loaded["q"].data_ptr() != loaded["all"].data_ptr()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metadata.json", "manifest.json"])
def test_every_flipped_bit_is_refused(tmp_path, name):
    path = save_tiny(tmp_path / "c")
    original = (path / name).read_bytes()
    for position in range(len(original)):
        for bit in (0, 5, 7) if len(original) > 100 else range(8):
            damaged = bytearray(original)
            damaged[position] ^= 1 << bit
            (path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                load_checkpoint(path)
    (path / name).write_bytes(original)
    assert value_of(path) == 1.0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metadata.json", "manifest.json"])
def test_a_file_cut_short_or_missing_is_refused(tmp_path, name):
    path = save_tiny(tmp_path / "c")
    original = (path / name).read_bytes()
    for length in (0, 1, len(original) // 2, len(original) - 1):
        (path / name).write_bytes(original[:length])
        with pytest.raises(CheckpointError, match=rf"damaged checkpoint: {name}"):
            load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"damaged checkpoint: {name} is missing"):
        load_checkpoint(path)


def test_all_damaged_files_are_named_at_once(tmp_path):
    path = save_tiny(tmp_path / "c")
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: expected \d+ bytes, got 2") as caught:
        load_checkpoint(path)
    assert "model.safetensors is missing" in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".hidden", "", "manifest.json"])
def test_a_forged_manifest_does_not_lead_out_of_the_directory(tmp_path, name):
    path = save_tiny(tmp_path / "c")
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (path / "manifest.json").write_bytes(checkpoints._manifest_bytes(manifest))
    with pytest.raises(CheckpointError, match="expected plain file names"):
        load_checkpoint(path)


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    path = save_tiny(tmp_path / "c")
    shutil.move(path / "config.json", tmp_path / "elsewhere.json")
    (path / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a plain file"):
        load_checkpoint(path)


def test_another_format_and_a_manifest_without_the_weights_are_refused(tmp_path):
    path = save_tiny(tmp_path / "c")
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_bytes(checkpoints._manifest_bytes(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="expected checkpoint format 1, got 2"):
        load_checkpoint(path)
    del manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_bytes(checkpoints._manifest_bytes(manifest))
    with pytest.raises(CheckpointError, match=r"expected entries for model\.safetensors, got none"):
        load_checkpoint(path)


def test_no_checkpoint_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        load_checkpoint(tmp_path / "nothing-here")


# --- nothing is written half ---


class Killed(BaseException):
    """The process ends here: no cleanup of ours may run afterwards."""


STEPS = {
    "the weights": ("write_tensors", 1),
    "the configuration": ("write_bytes", 1),
    "the metadata": ("write_bytes", 2),
    "the manifest": ("write_bytes", 3),
    "the directory": ("sync_directory", 1),
    "the swap": ("swap", 1),
}


def fail_at(monkeypatch, function: str, call: int, error: BaseException) -> list[int]:
    """Let the n-th call of a function write a little and then fail; counts the failures."""
    module = checkpoints if hasattr(checkpoints, function) else atomic
    original = getattr(module, function)
    calls, failures = [], []

    def failing(path, *args):
        calls.append(path)
        if len(calls) < call:
            return original(path, *args)
        failures.append(call)
        if function.startswith("write"):
            path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, function, failing)
    return failures


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_trace(tmp_path, monkeypatch, step, existing):
    path = tmp_path / "c"
    if existing:
        save_tiny(path, 1.0)
    with monkeypatch.context() as patch:
        failures = fail_at(patch, *STEPS[step], OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            save_tiny(path, 2.0)
        assert failures, "the planted fault was never reached"
    assert [entry.name for entry in tmp_path.iterdir()] == (["c"] if existing else [])
    if existing:
        assert value_of(path) == 1.0
    save_tiny(path, 3.0)
    assert value_of(path) == 3.0 and [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("failing_rename", [1, 2])
def test_a_failed_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing_rename):
    path, rename, calls = save_tiny(tmp_path / "c", 1.0), os.rename, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == failing_rename:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            save_tiny(path, 2.0)
    assert value_of(path) == 1.0 and [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("function, call", [*STEPS.values(), ("rename", 1), ("rename", 2), ("rmtree", 1)])
def test_a_killed_process_leaves_the_old_checkpoint_or_the_new(tmp_path, monkeypatch, function, call):
    path = save_tiny(tmp_path / "c", 1.0)
    with monkeypatch.context() as patch:
        if function == "rename":
            rename, calls = os.rename, []

            def killed_before(source, target):
                calls.append(target)
                if len(calls) == call:
                    raise Killed
                rename(source, target)

            patch.setattr(os, "rename", killed_before)
        elif function != "rmtree":
            fail_at(patch, function, call, Killed())

        def no_cleanup(*args, **kwargs):
            raise Killed

        patch.setattr(shutil, "rmtree", no_cleanup)
        with pytest.raises(Killed):
            save_tiny(path, 2.0)
    expected = 2.0 if function == "rmtree" else 1.0
    assert value_of(path) == expected
    assert value_of(latest_checkpoint(tmp_path)) == expected
    save_tiny(path, 3.0)
    assert value_of(path) == 3.0 and [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
def test_a_real_write_limit_leaves_the_old_checkpoint(tmp_path):
    """The operating system itself refuses to write on, inside safetensors' own writer."""
    script = """
        import resource, signal, sys, torch
        from pathlib import Path
        from blip2_kernels.model.checkpoints import load_checkpoint, save_checkpoint
        path = Path(sys.argv[1])
        save_checkpoint(path, {"w": torch.ones(4)}, config={})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save_checkpoint(path, {"w": torch.zeros(4096)}, config={})
        except OSError as error:
            print("refused:", error)
        print(load_checkpoint(path).state["w"].tolist(), [entry.name for entry in path.parent.iterdir()])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "c")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and done.stdout.endswith("[1.0, 1.0, 1.0, 1.0] ['c']\n"), done.stdout


# --- what may be saved and where ---


def test_nan_and_infinite_weights_are_all_named(tmp_path):
    state = {"fine": torch.ones(2), "a": torch.tensor([1.0, float("nan")]), "b": torch.tensor(-float("inf"))}
    with pytest.raises(ValueError, match=r"model_state: expected finite values, got NaN or infinity in a, b"):
        save_checkpoint(tmp_path / "c", state, config={})
    assert not (tmp_path / "c").exists()
    path = save_checkpoint(tmp_path / "c", state, config={}, check_finite=False)
    assert load_checkpoint(path).state["a"].isnan().tolist() == [False, True]
    with pytest.raises(CheckpointError, match="NaN or infinity in a, b"):
        load_checkpoint(path, check_finite=True)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model_state": [1]}, TypeError, "model_state: expected a mapping of names to tensors, got list"),
        ({"model_state": {"w": 1.0}}, TypeError, r"model_state\['w'\]: expected a dense tensor, got float"),
        (
            {"model_state": {"w": torch.ones(1, device="meta")}},
            TypeError,
            r"model_state\['w'\]: expected a dense tensor, got a tensor without data",
        ),
        ({"model_state": {3: torch.ones(1)}}, TypeError, "model_state: expected names of type str, got 3"),
        ({"config": {"a": {1: 2}}}, TypeError, r"config\['a'\]: expected keys of type str, got 1"),
        ({"config": {"a": object()}}, TypeError, "config: expected what JSON can hold"),
        ({"metadata": {"loss": float("nan")}}, TypeError, "metadata: expected what JSON can hold"),
        ({"config": "tiny"}, TypeError, "config: expected a mapping, got str"),
        ({"extra": {"../x": {}}}, ValueError, r"extra: expected names .* got '\.\./x'"),
        ({"extra": {"model": {}}}, ValueError, "none of them 'model'; got 'model'"),
        ({"extra": {"o": {"step": 3}}}, TypeError, r"extra\['o'\]\['step'\]: expected a dense tensor"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, arguments, error, message):
    good = {"model_state": {"w": torch.ones(1)}, "config": {}}
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "deep" / "c", **(good | arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="expected a checkpoint or an empty directory to replace"):
        save_tiny(tmp_path / "thesis")
    with pytest.raises(ValueError, match="expected a directory, got the file"):
        save_tiny(tmp_path / "thesis" / "chapter.txt")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert value_of(save_tiny(tmp_path / "empty")) == 1.0


# --- into a model ---


def test_load_into_names_every_misfit_and_changes_nothing():
    model = TiedModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.ones_like(value) for name, value in before.items()}
    del state["linear.bias"], state["brief"]
    state |= {"surplus": torch.ones(1), "linear.weight": torch.ones(8, 9), "positions": torch.ones(5)}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state)
    text = str(caught.value)
    assert "2 missing: brief, linear.bias" in text and "1 unexpected: surplus" in text
    assert "linear.weight (expected float32 [8, 8], got float32 [8, 9])" in text
    assert "positions (expected int64 [5], got float32 [5])" in text
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())

    with pytest.raises(CheckpointError, match="2 mis-shaped: positions") as caught:
        load_into(model, state, strict=False)
    assert "missing" not in str(caught.value)
    del state["linear.weight"], state["positions"]
    report = load_into(model, state, strict=False)
    assert set(report.missing) == {"linear.weight", "linear.bias", "brief", "positions"}
    assert report.unexpected == ("surplus",)
    assert torch.equal(model.embedding.weight, torch.ones(11, 8))
    assert torch.equal(model.linear.weight, before["linear.weight"])


def test_load_into_casts_to_the_models_dtype():
    model = nn.Linear(2, 2).double()
    load_into(model, {"weight": torch.full((2, 2), 0.5).half(), "bias": torch.zeros(2)})
    assert model.weight.dtype == torch.float64 and model.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]


# --- the latest ---


def test_latest_checkpoint_counts_by_number_and_ignores_what_is_incomplete(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None and latest_checkpoint(tmp_path) is None
    for step in (9, 100, 20):
        save_tiny(tmp_path / f"step-{step}", step)
    save_tiny(tmp_path / "final", 0)
    (tmp_path / "step-300").mkdir()
    (tmp_path / ".step-400.partial").mkdir()
    (tmp_path / "notes-500.txt").write_text("no checkpoint")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100"

    (tmp_path / "step-100" / "config.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100"
    assert latest_checkpoint(tmp_path, verify=True) == tmp_path / "step-20"


def test_no_device_is_named(tmp_path):
    save_checkpoint(tmp_path / "a", {"x": torch.ones(1)}, config={})
    with pytest.raises(ValueError, match=r"^device: expected a torch.device or its name, got 'gpu'"):
        load_checkpoint(tmp_path / "a", device="gpu")
