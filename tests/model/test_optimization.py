"""Which parameters decay, and how the learning rate moves."""

import math

import pytest
import torch
from pretraining_cases import small_model
from torch import nn

from blip2_kernels.model.optimization import decays, learning_rate_factor, parameter_groups


def test_learning_rate_warms_up_linearly_and_follows_the_cosine_to_its_floor():
    factors = [learning_rate_factor(s, 12, warmup_steps=4, final_factor=0.1) for s in range(13)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    for step in range(4, 13):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2
        assert factors[step] == pytest.approx(expected), step
    assert factors[4] == 1.0 and factors[12] == pytest.approx(0.1)


def test_other_schedules():
    assert [learning_rate_factor(s, 4, schedule="linear", final_factor=0.5) for s in (0, 2, 4)] == [
        1,
        0.75,
        0.5,
    ]
    assert learning_rate_factor(3, 4, schedule="constant") == 1.0
    assert learning_rate_factor(5, 8, warmup_steps=2, schedule=lambda done, length: done / length) == 0.5
    with pytest.raises(ValueError, match=r"schedule: expected one of .*cosine.*got 'cosin'"):
        learning_rate_factor(1, 2, schedule="cosin")


def test_no_decay_for_biases_norms_temperature_and_query_tokens():
    model = small_model()
    model.qformer.encoder.layer[0].requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.5 for p in g["params"]}
    spared = {names[id(p)] for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert {"temp", "query_tokens", "ln_vision.weight", "ln_vision.bias", "itm_head.bias"} <= spared
    assert {"itm_head.weight", "embeddings.word_embeddings.weight"} <= decayed
    assert all(n.endswith("weight") and "norm" not in n.lower() for n in decayed), decayed
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert decayed | spared == trained and not decayed & spared
    assert not any(".layer.0." in n for n in trained)


def test_learning_rate_multipliers_take_the_longest_prefix():
    model = nn.ModuleDict({"first": nn.Linear(4, 8), "last": nn.Linear(8, 1)})
    groups = parameter_groups(
        model,
        learning_rate=2.0,
        weight_decay=0.0,
        learning_rate_multipliers={"first": 0.5, "first.bias": 3.0},
    )
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert rates[id(model["first"].weight)] == 1.0 and rates[id(model["first"].bias)] == 6.0
    assert rates[id(model["last"].weight)] == 2.0
    with pytest.raises(ValueError, match=r"learning_rate_multipliers.*\['other'\]"):
        parameter_groups(model, learning_rate=1.0, weight_decay=0.0, learning_rate_multipliers={"other": 2.0})
    with pytest.raises(ValueError, match="at least one parameter with requires_grad"):
        parameter_groups(nn.Linear(1, 1).requires_grad_(False), learning_rate=1.0, weight_decay=0.0)


def test_decays_is_about_shape_and_name():
    assert decays("a.weight", nn.Parameter(torch.zeros(2, 2)))
    assert not decays("a.weight", nn.Parameter(torch.zeros(2)))
    assert not decays("query_tokens", nn.Parameter(torch.zeros(1, 2, 2)))


RATES = {"learning_rate": 1.0, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: learning_rate_factor(-5, 10), ValueError, "^step: expected an int >= 0, got -5"),
        (lambda: learning_rate_factor(0, "x"), TypeError, "^total_steps: expected an int >= 0, got str 'x'"),
        (
            lambda: learning_rate_factor(1, 9, warmup_steps=-3),
            ValueError,
            "^warmup_steps: expected an int >= 0",
        ),
        (lambda: learning_rate_factor(1, 9, final_factor=-1.0), ValueError, "^final_factor: .*>= 0, got -1"),
        (
            lambda: learning_rate_factor(0, 9, warmup_steps=3, schedule="cos"),
            ValueError,
            "^schedule: expected",
        ),
        (
            lambda: learning_rate_factor(0, 9, schedule=lambda done, length: "fast"),
            TypeError,
            "^schedule: expected a function that returns a number, got str 'fast'",
        ),
        (lambda: parameter_groups(5, **RATES), TypeError, r"^model: expected a torch\.nn\.Module, got int 5"),
        (
            lambda: parameter_groups(nn.Linear(1, 1), **{**RATES, "learning_rate": -1.0}),
            ValueError,
            "^learning_rate: expected a finite number >= 0, got -1",
        ),
        (
            lambda: parameter_groups(nn.Linear(1, 1), **{**RATES, "weight_decay": "a"}),
            TypeError,
            "^weight_decay: expected a finite number >= 0, got str 'a'",
        ),
        (
            lambda: parameter_groups(nn.Linear(1, 1), weight_decay_filter=None, **RATES),
            TypeError,
            "^weight_decay_filter: expected a function, got NoneType",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
