"""Checkpointing of whole models: the same step in less memory, and transformers' Trainer reaches it."""

import pytest
import torch
from generation_cases import PROMPT_LENGTHS, TEXTS, features, pad, stage2
from pretraining_cases import BOTH_PATHS, small_batch, small_model, some_negatives
from test_memory import saved_bytes
from test_savings import assert_same_step, step
from transformers import Trainer, TrainingArguments


def stage1_case(dropout: float) -> tuple[torch.nn.Module, dict]:
    model = small_model(dtype=torch.float64, dropout=dropout)
    inputs = small_batch(4) | {"negatives": some_negatives(4)}
    return model.train(), inputs | {"image_features": inputs["image_features"].double()}


def stage2_case(dropout: float) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(0)
    ids, mask = pad(TEXTS, "right")
    inputs = {"input_ids": ids, "attention_mask": mask, "prompt_lengths": PROMPT_LENGTHS}
    return stage2("llama", dropout=dropout).double().train(), inputs | {"image_features": features().double()}


@BOTH_PATHS
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["calm", "dropout"])
@pytest.mark.parametrize("case", [stage1_case, stage2_case], ids=["stage 1", "stage 2"])
def test_a_checkpointed_step_is_the_same_and_keeps_less(case, dropout, use_fused):
    model, inputs = case(dropout)
    model.use_fused = use_fused
    kept = saved_bytes(model, inputs)
    expected = step(model, inputs)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    absent = ("logits",) if use_fused else ()
    assert_same_step(step(model, inputs), expected, torch.float64, absent)
    assert saved_bytes(model, inputs) < 0.9 * kept
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert saved_bytes(model, inputs) == kept


def test_the_newer_names_do_the_same_and_what_is_not_served_is_refused():
    model, _ = stage1_case(0.0)
    assert model.supports_gradient_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing and model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    for options, message in (
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=False, the only kind"),
        ({"every_n_layers": 2}, "every_n_layers: expected 1, every layer is checkpointed, got 2"),
        ({"offload": True}, "offload: expected False"),
    ):
        with pytest.raises(ValueError, match=message):
            model.gradient_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("asked", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("case", [stage1_case, stage2_case], ids=["stage 1", "stage 2"])
def test_the_flag_of_a_plain_trainer_takes_effect(case, asked, tmp_path):
    model, inputs = case(0.0)
    seen = []

    class Watching(Trainer):
        def compute_loss(self, model, *arguments, **options):
            seen.append(model.qformer.checkpoints)
            return super().compute_loss(model, *arguments, **options)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        gradient_checkpointing=asked,
        max_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Watching(model, arguments, train_dataset=[0], data_collator=lambda samples: inputs).train()
    assert seen == [asked]
