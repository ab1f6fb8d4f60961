"""Models trained in turn: the two paths learn the same with dropout on, and a fault in one of them shows."""

import copy

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.demo.paths import LIMIT
from blip2_kernels.model.demo.side_by_side import Learner, largest_difference, summarise, train_in_turn
from blip2_kernels.model.pretraining import Blip2ForPreTraining
from blip2_kernels.model.train import train

STEPS = 20


def small_stage1(dropout: float = 0.1) -> Blip2ForPreTraining:
    torch.manual_seed(0)
    qformer = Blip2QFormerConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        encoder_hidden_size=16, use_qformer_text_input=True, initializer_range=0.2,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    config = Blip2PreTrainingConfig(
        qformer, num_query_tokens=4, image_text_hidden_size=8, cls_token_id=1, sep_token_id=2
    )
    return Blip2ForPreTraining(config)


def small_batches(count: int = STEPS) -> list[dict]:
    """Six texts of 3 to 8 tokens, padded, and features."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        lengths = torch.randint(3, 9, (6, 1), generator=generator)
        mask = (torch.arange(8) < lengths).long()
        ids = torch.randint(3, 49, (6, 8), generator=generator)
        ids[:, 0] = 1
        features = torch.randn(6, 9, 16, generator=generator)
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "image_features": features})
    return batches


def both_paths(change=lambda fused: None) -> dict:
    models = {"plain": small_stage1()}
    models["fused"] = copy.deepcopy(models["plain"])
    models["fused"].use_fused = True
    learners = {name: Learner(model, learning_rate=1e-3, warmup_steps=10) for name, model in models.items()}
    change(learners["fused"])
    return train_in_turn(learners, small_batches(), seed=3)


def test_both_paths_learn_the_same_with_dropout_on():
    curves = both_paths()
    summary = summarise(curves, {"fused": "plain"}, STEPS)
    assert summary["fused"]["largest_difference"] <= LIMIT
    assert summary["plain"]["largest_difference"] == 0 and summary["plain"]["times_as_fast"] == 1
    for rows in curves.values():
        assert len(rows) == STEPS and set(rows[0]) == {"loss", "loss_itc", "loss_itm", "loss_itg", "seconds"}
        losses = [row["loss"] for row in rows]
        assert sum(losses[-5:]) < sum(losses[:5]) - 5, "nothing was learned"


def perturb_a_weight(learner: Learner) -> None:
    with torch.no_grad():
        learner.model.qformer.encoder.layer[1].attention.attention.query.weight.mul_(1.02)


def drop_nothing(learner: Learner) -> None:
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    for name in rates:
        setattr(learner.model.config.qformer, name, 0.0)
    for module in learner.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def drop_otherwise(learner: Learner) -> None:
    """What a mask that depends on the packing would do."""
    step = learner.step
    learner.step = lambda batch, seed: step(batch, seed + 1)


def lose_a_gradient(learner: Learner) -> None:
    """The first losses are right: what is wrong shows once it was trained."""
    learner.model.qformer.encoder.layer[1].intermediate_query.dense.weight.register_hook(
        lambda grad: 0 * grad
    )


@pytest.mark.parametrize("fault", [perturb_a_weight, drop_nothing, drop_otherwise, lose_a_gradient])
def test_a_fault_in_one_path_shows(fault):
    curves = both_paths(fault)
    assert largest_difference(curves["fused"], curves["plain"], STEPS) > LIMIT


def test_a_loss_that_is_no_number_is_no_agreement():
    rows = [{"loss": 1.0, "loss_itm": 0.5, "seconds": 1.0}, {"loss": 2.0, "loss_itm": 0.5, "seconds": 2.0}]
    other = [rows[0], {"loss": 2.0, "loss_itm": float("nan"), "seconds": 1.0}]
    assert largest_difference(rows, rows, 2) == 0
    assert not largest_difference(other, rows, 2) <= LIMIT
    assert largest_difference(other, rows, 1) == 0


def test_a_learner_is_trained_as_train_trains():
    """Without dropout and with given negatives nothing is drawn, and the losses are the same to the bit."""
    other = torch.arange(6).roll(1)
    batches = [batch | {"negatives": (other, other)} for batch in small_batches(6)]
    model = small_stage1(dropout=0.0)
    learner = Learner(
        copy.deepcopy(model), learning_rate=1e-3, warmup_steps=3, learning_rate_multipliers={"qformer.": 0.5}
    )
    ours = train_in_turn({"ours": learner}, batches)["ours"]
    theirs = train(
        model, batches, collate=lambda samples: samples[0], batch_sampler=[[step] for step in range(6)],
        max_steps=6, warmup_steps=3, schedule="constant", learning_rate=1e-3,
        learning_rate_multipliers={"qformer.": 0.5}, device="cpu", progress=False,
    ).history  # fmt: skip
    for row, expected in zip(ours, theirs, strict=True):
        assert all(row[name] == expected[name] for name in ("loss", "loss_itc", "loss_itm", "loss_itg"))
