"""Training: numbers of the history, the stop before a bad step, resumption to the bit, checkpoints."""

import json
import math
import shutil

import pytest
import torch
from pretraining_cases import small_batch, small_model
from torch import nn
from transformers import TrainerCallback

from blip2_kernels.model import train as train_module
from blip2_kernels.model.checkpoints import latest_checkpoint, load_checkpoint
from blip2_kernels.model.data.batches import ShuffledBatches, SizedRankBatches
from blip2_kernels.model.optimization import learning_rate_factor
from blip2_kernels.model.train import NonFiniteLossError, loss_parts, train, weighted_loss
from blip2_kernels.model.training_state import HistoryFile, read_history, remove_run

pytest.importorskip("accelerate")


class Toy(nn.Module):
    """Two losses, dropout, a frozen part, and a fault to order."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.calls: list[list[float]] = []
        self.fault = {}

    def forward(self, x, y):
        self.calls.append(y.tolist())
        prediction = self.last(self.dropout(self.first(self.frozen(x)).tanh())).squeeze(-1)
        fit, size = (prediction - y).square().mean(), prediction.abs().mean()
        if self.training and len(self.calls) == self.fault.get("call"):
            size = size * self.fault["factor"]
        return {"loss": fit + size, "loss_fit": fit, "loss_size": size}


def toy(seed: int = 1, **options) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def samples(count: int = 22) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, generator=generator)
    return [{"x": row, "y": torch.tensor(float(i))} for i, row in enumerate(x)]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


QUIET = {"progress": False, "device": "cpu", "learning_rate": 1e-2}


# --- batches ---


def test_shuffled_batches_show_every_sample_once_an_epoch_in_an_order_of_its_own():
    batches = ShuffledBatches(23, 4, seed=5, drop_last=False)
    epochs = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert (
            sorted(i for batch in epochs[-1] for i in batch) == list(range(23))
            and len(epochs[-1]) == len(batches) == 6
        )
    assert epochs[0] != epochs[1] != epochs[2]
    again = ShuffledBatches(23, 4, seed=5, drop_last=False)
    assert list(again) == epochs[0] and list(ShuffledBatches(23, 4, seed=6)) != epochs[0][:5]
    assert [len(b) for b in ShuffledBatches(23, 4)] == [4] * 5
    with pytest.raises(ValueError, match="at least one batch of 4 samples, got 3"):
        ShuffledBatches(3, 4)


def test_ranks_share_the_batches_in_turn_and_none_twice():
    batches = [[i] for i in range(7)]
    shares = [list(SizedRankBatches(batches, rank, 3)) for rank in range(3)]
    assert shares == [[[0], [3]], [[1], [4]], [[2], [5]]]
    assert len(SizedRankBatches(batches, 0, 3)) == 2


# --- the loop ---


def test_a_step_is_adamw_on_the_loss_with_the_scheduled_rate():
    model, plain = toy(dropout=0.0), toy(dropout=0.0)
    data = samples(8)
    result = train(
        model, data, max_steps=5, batch_size=4, warmup_steps=2, weight_decay=0.3, max_grad_norm=0.5, **QUIET
    )
    groups = [
        {"params": [plain.first.weight, plain.last.weight], "weight_decay": 0.3},
        {"params": [plain.first.bias, plain.last.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98))
    batches = ShuffledBatches(8, 4, seed=0)
    for step in range(5):
        batches.set_epoch(step // 2)
        batch = [data[i] for i in list(batches)[step % 2]]
        rate = 1e-2 * learning_rate_factor(step, 5, warmup_steps=2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        output = plain(torch.stack([s["x"] for s in batch]), torch.stack([s["y"] for s in batch]))
        optimizer.zero_grad()
        output["loss"].backward()
        norm = nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        row = result.history[step]
        assert row["step"] == step + 1
        assert row["learning_rate"] == pytest.approx(rate)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        for name, value in output.items():
            assert row[name] == pytest.approx(value.item(), rel=1e-5), (step, name)
        assert row["seconds"] > 0
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    assert result.steps == 5 and result.seconds > 0 and not result.checkpoints
    assert all(p.grad is None for p in model.parameters())


def test_stage_1_learns_and_only_what_is_trained_is_saved(tmp_path):
    model = small_model(dropout=0.0)
    model.cls.requires_grad_(False)
    batch = small_batch(8)
    data = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    result = train(
        model, data, max_steps=25, batch_size=8, output_dir=tmp_path, progress=False, learning_rate=5e-3,
        device="cpu",
    )  # fmt: skip
    first, last = result.history[0], result.history[-1]
    assert {"loss", "loss_itc", "loss_itm", "loss_itg"} <= set(first)
    assert first["loss"] == pytest.approx(first["loss_itc"] + first["loss_itm"] + first["loss_itg"], rel=1e-5)
    assert last["loss"] < first["loss"] - 0.5, (first, last)
    for name, value in frozen.items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name
    checkpoint = load_checkpoint(result.checkpoints[-1])
    assert set(checkpoint.state) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert checkpoint.config == json.loads(json.dumps(model.config.to_dict()))
    assert checkpoint.metadata["step"] == 25 and checkpoint.metadata["model"] == "Blip2ForPreTraining"
    for name, value in checkpoint.state.items():
        assert torch.equal(value, dict(model.named_parameters())[name].detach()), name


def test_gradient_accumulation_averages_the_micro_batches():
    one, many = toy(dropout=0.0), toy(dropout=0.0)
    data = samples(8)
    whole = train(one, data, max_steps=2, batch_size=8, **QUIET)
    batches, order = ShuffledBatches(8, 8), []
    for epoch in range(2):
        batches.set_epoch(epoch)
        order += list(batches)
    halves = [half for batch in order for half in (batch[:4], batch[4:])]
    parts = train(many, data, max_steps=2, batch_sampler=halves, gradient_accumulation_steps=2, **QUIET)
    torch.testing.assert_close(weights(one), weights(many), rtol=1e-5, atol=1e-6)
    assert parts.history[1]["loss"] == pytest.approx(whole.history[1]["loss"], rel=1e-5)


def test_the_caller_composes_batches():
    class Pairs:
        def __init__(self):
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

        def __len__(self):
            return 2

        def __iter__(self):
            yield [self.epochs[-1], 10]
            yield [20, 21]

    model = toy()
    result = train(model, samples(), epochs=2, batch_sampler=Pairs(), **QUIET)
    assert result.steps == 4
    assert model.calls == [[0, 10], [20, 21], [1, 10], [20, 21]]


def test_an_endless_stream_and_a_batch_sampler_without_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from samples(5)

    model = toy()
    train(model, Stream(), max_steps=3, batch_size=2, **QUIET)
    assert model.calls == [[0, 1], [2, 3], [4, 0]]
    model = toy()
    train(model, samples(), max_steps=3, batch_sampler=(b for b in [[1], [2], [3], [4]]), **QUIET)
    assert model.calls == [[1], [2], [3]]


def test_loss_weights_move_with_the_step_and_spare_the_backward_pass_of_parts_without_weight():
    model, reference = toy(dropout=0.0), toy(dropout=0.0)
    data = samples(4)
    plan = {0: {"loss_fit": 2.0}, 1: {"loss_fit": 1.0, "loss_size": 0.5}, 2: None}
    result = train(model, data, max_steps=3, batch_size=4, loss_weights=plan.get, **QUIET)
    rows = result.history
    assert rows[0]["loss"] == pytest.approx(2 * rows[0]["loss_fit"])
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_fit"] + 0.5 * rows[1]["loss_size"])
    assert rows[2]["loss"] == pytest.approx(rows[2]["loss_fit"] + rows[2]["loss_size"])
    parts = loss_parts(reference(torch.randn(3, 4), torch.zeros(3)))
    alone = weighted_loss(parts, {"loss_fit": 1.0, "loss_size": 0.0})
    assert torch.autograd.grad(alone, parts["loss_size"], retain_graph=True, allow_unused=True) == (None,)
    kept = weighted_loss(parts, {"loss_fit": 1.0}, keep_zero=True)
    assert torch.autograd.grad(kept, parts["loss_size"])[0] == 0.0
    with pytest.raises(ValueError, match=r"loss_weights: expected names among .*got \['loss_itc'\]"):
        train(toy(), data, max_steps=1, batch_size=4, loss_weights={"loss_itc": 1.0}, **QUIET)
    with pytest.raises(ValueError, match="at least one weight other than 0"):
        weighted_loss(parts, {"loss_fit": 0.0})


def test_a_step_function_replaces_the_call_and_sees_the_step():
    seen = []

    def step_function(model, batch, step):
        seen.append(step)
        return {"loss_only": model(**batch)["loss_fit"]}

    result = train(
        toy(), samples(), max_steps=3, batch_size=4, step_function=step_function,
        loss_weights={"loss_only": 3.0}, **QUIET,
    )  # fmt: skip
    assert seen == [0, 1, 2]
    assert result.history[2]["loss"] == pytest.approx(3 * result.history[2]["loss_only"])


def test_bf16_runs_the_forward_pass_in_bfloat16_and_leaves_nothing_behind():
    dtypes = []

    class Watch(Toy):
        def forward(self, x, y):
            dtypes.append(self.first(x).dtype)
            return super().forward(x, y)

    torch.manual_seed(0)
    model = Watch()
    train(model, samples(), max_steps=2, batch_size=4, bf16=True, **QUIET)
    assert dtypes == [torch.bfloat16] * 2
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model.eval()(torch.randn(2, 4), torch.zeros(2))
    assert dtypes[-1] == torch.float32  # what comes after training is not under its autocast
    train(model, samples(), max_steps=1, batch_size=4, **QUIET)
    assert dtypes[-1] == torch.float32


def test_evaluation_sees_eval_mode_and_does_not_disturb_the_run():
    def evaluate(model, step):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(100)
        return {"step_was": step, "figure": 1.5}

    watched, alone = toy(), toy()
    options = {"max_steps": 5, "batch_size": 4, **QUIET}
    result = train(watched, samples(), evaluate=evaluate, evaluate_every=2, **options)
    train(alone, samples(), **options)
    assert [row["step"] for row in result.evaluations] == [2, 4, 5]
    assert result.evaluations[0] == {"step": 2, "step_was": 2, "figure": 1.5}
    assert torch.equal(weights(watched), weights(alone))
    assert watched.training


def test_hooks_see_every_step():
    rows, events = [], []

    class Count(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **_):
            events.append(state.global_step)

    train(toy(), samples(), max_steps=3, batch_size=4, on_step=rows.append, callbacks=[Count()], **QUIET)
    assert [row["step"] for row in rows] == [1, 2, 3] and events == [0, 1, 2]


# --- the stop before a bad step ---


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(tmp_path, factor):
    model = toy()
    model.fault = {"call": 4, "factor": factor}
    after = {}
    with pytest.raises(NonFiniteLossError) as caught:
        train(
            model, samples(), max_steps=10, batch_size=4, output_dir=tmp_path, save_every=2,
            on_step=lambda row: after.update({row["step"]: weights(model)}), **QUIET,
        )  # fmt: skip
    error = caught.value
    assert error.step == 4
    assert not math.isfinite(error.parts["loss_size"]) and math.isfinite(error.parts["loss_fit"])
    assert error.last_checkpoint == tmp_path / "checkpoint-2"
    for piece in ("step 4", "loss_size = " + str(factor), "loss_fit = ", "checkpoint-2"):
        assert piece in str(error), str(error)
    assert torch.equal(weights(model), after[3])
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3]
    load_checkpoint(error.last_checkpoint, check_finite=True)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a step later, as on CUDA"])
def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_step(monkeypatch, tmp_path, late):
    from blip2_kernels.model import trainer

    monkeypatch.setattr(trainer, "reads_late", lambda device: late)

    class Sharp(Toy):
        def forward(self, x, y):
            output = super().forward(x, y)
            if len(self.calls) == 3:  # finite value, infinite slope: sqrt at 0
                output["loss"] = output["loss"] + (self.last.bias * 0).sqrt().sum()
            return output

    torch.manual_seed(0)
    model, before = Sharp(), []
    with pytest.raises(NonFiniteLossError) as caught:
        train(
            model, samples(), max_steps=5, batch_size=4, output_dir=tmp_path, save_every=3,
            on_step=lambda _: before.append(weights(model)), **QUIET,
        )  # fmt: skip
    assert caught.value.step == 3 and not math.isfinite(caught.value.parts["grad_norm"])
    assert math.isfinite(caught.value.parts["loss"])
    assert caught.value.last_checkpoint is None and "none was written" in str(caught.value)
    assert torch.equal(weights(model), before[1]) and not list(tmp_path.glob("checkpoint-*"))


def test_a_part_that_is_not_finite_stops_training_even_where_it_weighs_nothing():
    model = toy()
    model.fault = {"call": 2, "factor": math.nan}
    with pytest.raises(NonFiniteLossError, match=r"step 2, .*loss_size = nan"):
        train(model, samples(), max_steps=3, batch_size=4, loss_weights={"loss_fit": 1.0}, **QUIET)


def test_figures_read_late_are_those_read_at_once(monkeypatch, tmp_path):
    from blip2_kernels.model import trainer

    results = []
    for late in (False, True):
        monkeypatch.setattr(trainer, "reads_late", lambda device, late=late: late)
        model = toy()
        result = train(
            model,
            samples(),
            max_steps=6,
            batch_size=4,
            output_dir=tmp_path / str(late),
            save_every=4,
            **QUIET,
        )
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
        assert all("grad_norm" in row for row in read_history(tmp_path / str(late)))
        results.append((rows, weights(model)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


# --- checkpoints and resumption ---


@pytest.mark.parametrize("stop", [3, 5])  # in the middle of an epoch of 5 batches, and at its end
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, stop):
    options = {"max_steps": 8, "batch_size": 4, "warmup_steps": 2, "weight_decay": 0.1, **QUIET}
    whole = toy()
    expected = train(whole, samples(), **options)
    torch.manual_seed(99)
    first = toy()
    train(first, samples(), output_dir=tmp_path, save_every=stop, keep_checkpoints=9, **options)
    second = toy(seed=7)
    second.frozen.load_state_dict(whole.frozen.state_dict())
    torch.manual_seed(123)
    result = train(
        second, samples(), output_dir=tmp_path, resume_from=tmp_path / f"checkpoint-{stop}", **options
    )
    assert torch.equal(weights(whole), weights(second))
    for row, wanted in zip(result.history, expected.history, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {
            k: v for k, v in wanted.items() if k != "seconds"
        }
    assert [row["step"] for row in read_history(tmp_path)] == list(range(1, 9))
    assert result.steps == 8


def test_only_the_newest_checkpoints_stay(tmp_path):
    result = train(
        toy(),
        samples(),
        max_steps=7,
        batch_size=4,
        output_dir=tmp_path,
        save_every=2,
        keep_checkpoints=2,
        **QUIET,
    )
    assert result.checkpoints == [tmp_path / "checkpoint-6", tmp_path / "checkpoint-7"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7", "history.jsonl"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-7"


def test_resuming_refuses_what_does_not_fit(tmp_path):
    options = {"batch_size": 4, **QUIET}
    train(toy(), samples(), max_steps=2, output_dir=tmp_path, **options)
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="max_steps: expected more than the 2 steps"):
        train(toy(), samples(), max_steps=2, resume_from=checkpoint, **options)
    other = toy()
    other.last = nn.Linear(8, 1, bias=False)
    other.first = nn.Linear(4, 8)
    other.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"missing extra\.weight.*unexpected last\.bias"):
        train(other, samples(), max_steps=4, resume_from=checkpoint, **options)
    with pytest.raises(ValueError, match="parameter groups of this run"):
        train(
            toy(), samples(), max_steps=4, resume_from=checkpoint,
            learning_rate_multipliers={"first": 2.0}, **options,
        )  # fmt: skip
    with pytest.raises(ValueError, match="resume_from: expected a checkpoint folder"):
        train(toy(), samples(), max_steps=4, resume_from=tmp_path / "checkpoint-3", **options)
    raw = bytearray((checkpoint / "optimizer.safetensors").read_bytes())
    raw[-3] ^= 4
    (checkpoint / "optimizer.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors"):
        train(toy(), samples(), max_steps=4, resume_from=checkpoint, **options)


def test_a_history_that_cannot_be_put_in_place_leaves_no_trace(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("disk full")

    history = HistoryFile(tmp_path, [{"step": 1.0}])
    history.add({"step": 2.0})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(OSError, match="disk full"):
            history.flush()
    assert not [*tmp_path.iterdir()]
    history.close()
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2]


def test_history_on_disk_survives_a_line_cut_short(tmp_path):
    result = train(toy(), samples(), max_steps=3, batch_size=4, output_dir=tmp_path, **QUIET)
    assert read_history(tmp_path) == result.history
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text()[:-9])
    assert read_history(tmp_path) == result.history[:2]
    path.write_text("{]\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_history(tmp_path)


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": None}, "max_steps, epochs: expected exactly one"),
        ({"epochs": 1}, "max_steps, epochs: expected exactly one"),
        ({"max_steps": None, "epochs": math.inf}, "epochs: expected a finite number > 0, got inf"),
        ({"max_steps": None, "epochs": 0.0}, "epochs: expected a finite number > 0, got 0"),
        ({"max_steps": 1.5}, "max_steps: expected an int >= 1, got float 1.5"),
        ({"batch_size": None}, "batch_size, batch_sampler: expected exactly one of them, got neither"),
        ({"batch_size": 0}, "batch_size: expected an int >= 1, got 0"),
        ({"batch_size": 23}, "at least one batch of 23 samples, got 22"),
        ({"learning_rate": -1.0}, "learning_rate: expected a finite number >= 0, got -1"),
        ({"learning_rate": math.nan}, "learning_rate: expected a finite number >= 0, got nan"),
        ({"learning_rate": math.inf}, "learning_rate: expected a finite number >= 0, got inf"),
        ({"learning_rate": "1"}, "learning_rate: expected a finite number >= 0, got str '1'"),
        ({"min_learning_rate": 1.0}, "min_learning_rate: expected a value in"),
        ({"min_learning_rate": math.nan}, "min_learning_rate: expected a finite number >= 0, got nan"),
        ({"weight_decay": math.inf}, "weight_decay: expected a finite number >= 0, got inf"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: expected a finite number >= 0, got nan"),
        ({"eps": None}, "eps: expected a finite number >= 0, got NoneType"),
        ({"betas": (2.0, 0.9)}, r"betas: expected a number in \[0, 1\), got 2"),
        ({"betas": 0.9}, r"betas: expected two numbers in \[0, 1\), got 0\.9"),
        ({"warmup_steps": None}, "warmup_steps: expected an int >= 0, got NoneType"),
        ({"seed": -1}, r"seed: expected an int in \[0, 4294967295\], got -1"),
        ({"seed": "a"}, r"seed: expected an int in \[0, 4294967295\], got str 'a'"),
        ({"bf16": "yes"}, "bf16: expected a bool, got str 'yes'"),
        ({"progress": 1}, "progress: expected a bool, got int 1"),
        ({"schedule": "cos"}, "schedule: expected one of"),
        ({"save_every": 5}, "save_every: expected an output_dir"),
        ({"evaluate_every": 5}, "evaluate_every: expected a function"),
        ({"evaluate": 3}, "evaluate: expected a function or None, got int 3"),
        ({"collate": 3}, "collate: expected a function or None, got int 3"),
        ({"step_function": 3}, "step_function: expected a function or None, got int 3"),
        ({"on_step": 3}, "on_step: expected a function or None, got int 3"),
        ({"weight_decay_filter": None}, "weight_decay_filter: expected a function, got NoneType"),
        ({"callbacks": 3}, "callbacks: expected a sequence of TrainerCallback, got int 3"),
        ({"callbacks": [3]}, "callbacks: expected a sequence of TrainerCallback, got int 3 in it"),
        ({"loss_weights": [1]}, "loss_weights: expected a function of the step or a mapping .*got list"),
        ({"loss_weights": {"loss_fit": math.nan}}, r"loss_weights\['loss_fit'\]: expected a finite number"),
        ({"learning_rate_multipliers": {"first": -1.0}}, r"learning_rate_multipliers\['first'\]: .*>= 0"),
        ({"batch_size": None, "batch_sampler": 3}, "batch_sampler: expected lists of indices, got int 3"),
        ({"output_dir": 5}, "output_dir: expected a path or None, got int 5"),
        ({"output_dir": f"{__file__}/x"}, r"output_dir: expected a folder, got .*test_train\.py is a file"),
        ({"resume_from": 5}, "resume_from: expected a path or None, got int 5"),
        ({"description": 5}, "description: expected a str, got int 5"),
        ({"device": "gpu"}, "device: expected None, 'cpu' or 'cuda', got 'gpu'"),
        ({"num_workers": -1}, "num_workers: expected an int >= 0, got -1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected an int >= 1, got 0"),
    ],
)
def test_refuses(change, message):
    options = {"max_steps": 2, "batch_size": 4, **QUIET, **change}
    with pytest.raises((TypeError, ValueError), match=f"^(dataset: expected )?{message}"):
        train(toy(), samples(), **options)


def test_a_run_that_cannot_start_leaves_the_old_one_alone(tmp_path):
    options = {"batch_size": 4, "output_dir": tmp_path, **QUIET}
    old = train(toy(), samples(), max_steps=3, **options).history
    with pytest.raises(ValueError, match=r"^output_dir: expected a folder without .*with checkpoint-3"):
        train(toy(), samples(), max_steps=2, **options)
    checkpoint = tmp_path / "checkpoint-3"
    faults = [
        {"betas": (2.0, 0.9)},
        {"learning_rate_multipliers": {"none": 1.0}},
        {"checkpoint_config": {"a": {1}}},
        {"weight_decay_filter": lambda name, parameter: name / 2},
        {"loss_weights": {"loss_none": 1.0}},
    ]
    for fault in faults:
        with pytest.raises((TypeError, ValueError)):
            train(toy(), samples(), max_steps=9, resume_from=checkpoint, **{**options, **fault})
        assert read_history(tmp_path) == old and latest_checkpoint(tmp_path) == checkpoint
    # Without a checkpoint in the way a new run begins, and its first row takes the history's place.
    shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="learning_rate_multipliers: expected prefixes"):
        train(toy(), samples(), max_steps=2, **{**options, **faults[1]})
    assert read_history(tmp_path) == old
    new = train(toy(), samples(), max_steps=2, **options).history
    assert read_history(tmp_path) == new and len(new) == 2
    remove_run(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_start_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="learning_rate_multipliers"):
        train(
            toy(), samples(), max_steps=1, batch_size=4, output_dir=tmp_path / "run",
            learning_rate_multipliers={"none": 1.0}, **QUIET,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("saves", [False, True])
def test_parameters_that_the_last_step_broke_are_neither_saved_nor_returned(tmp_path, saves):
    options = {"output_dir": tmp_path} if saves else {}
    with pytest.raises(
        NonFiniteLossError, match=r"step 1, after an optimizer step that left first\.weight"
    ) as e:
        train(
            toy(), samples(), max_steps=1, batch_size=4, schedule=lambda done, length: math.nan, **options,
            **QUIET,
        )  # fmt: skip
    assert e.value.step == 1 and math.isfinite(e.value.parts["loss"])
    assert latest_checkpoint(tmp_path) is None


def test_refuses_what_is_no_model_and_outputs_without_a_loss():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        train(toy, samples(), max_steps=1, batch_size=4, **QUIET)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lr'"):
        train(toy(), samples(), max_steps=1, batch_size=4, lr=1e-4)
    with pytest.raises(TypeError, match="checkpoint_config: expected what JSON can hold"):
        train(toy(), samples(), max_steps=1, batch_size=4, checkpoint_config={"a": torch.ones(1)}, **QUIET)
    with pytest.raises(ValueError, match="expected a scalar `loss`"):
        loss_parts({"loss": torch.zeros(3), "logits": torch.zeros(())})
    with pytest.raises(TypeError, match="expected a mapping or dataclass"):
        loss_parts((torch.zeros(()),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"collate": lambda rows: rows}, "collate: expected a function that returns a mapping .*, got list"),
        ({"loss_weights": lambda step: 1.0}, r"loss_weights: expected a mapping of names .*, got float 1\.0"),
        ({"step_function": lambda *_: None}, "model output: expected a mapping or dataclass .* got NoneType"),
        ({"evaluate": lambda *_: None}, "evaluate: expected a function that returns a mapping .* NoneType"),
        ({"batch_size": None, "batch_sampler": [1, 2]}, "batch_sampler: expected lists of indices, got int"),
    ],
)
def test_functions_that_return_something_else_are_named(change, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        train(toy(), samples(), **{"max_steps": 1, "batch_size": 4, **QUIET, **change})


def test_a_folder_that_may_not_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"^output_dir: expected a folder to write in, got .* is read-only"):
        train(toy(), samples(), max_steps=1, batch_size=4, output_dir=tmp_path / "a" / "b", **QUIET)


def test_a_checkpoint_knows_what_it_was_trained_in_front_of(tmp_path):
    def in_front_of(seed: int) -> Toy:
        model = toy()
        torch.manual_seed(seed)
        model.speaker = nn.Linear(64, 64).requires_grad_(False)
        return model

    options = {"batch_size": 4, **QUIET}
    train(in_front_of(1), samples(), max_steps=2, output_dir=tmp_path, **options)
    checkpoint = tmp_path / "checkpoint-2"
    state = load_checkpoint(checkpoint)
    assert set(state.metadata["frozen"]) == {"frozen", "speaker"}
    assert not any("speaker" in name for name in state.state)
    other = in_front_of(2)
    before = weights(other).clone()
    with pytest.raises(ValueError, match=r"speaker: expected that of the training, Linear of 4,160 .* got L"):
        train(other, samples(), max_steps=4, resume_from=checkpoint, **options)
    assert torch.equal(weights(other), before)
    # The same one goes on, in any floating-point type, and so does a model that has none (one that is given
    # features, say). Quantised weights cannot be compared.
    half, quantised = in_front_of(1), in_front_of(2)
    half.speaker.to(torch.float16)
    quantised.speaker.weight = nn.Parameter(torch.ones(64, 32, dtype=torch.uint8), requires_grad=False)
    for model in (in_front_of(1), half, quantised, toy()):
        assert train(model, samples(), max_steps=4, resume_from=checkpoint, **options).steps == 4


def test_says_which_extra_is_missing(monkeypatch):
    monkeypatch.setattr(train_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"accelerate.*pip install 'blip2-kernels\[train\]'"):
        train(toy(), samples(), max_steps=1, batch_size=4)


# --- progress ---


def test_train_reports_loss_parts_and_time_left(capsys):
    train(toy(), samples(), max_steps=3, batch_size=4, device="cpu", description="stage 1")
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[-1].startswith("stage 1: 3/3 · loss ") and "(fit " in lines[-1] and lines[-1].endswith("left")
    )
