"""What the fused path costs: counted, equal to the plan's closed form, and a fraction of the plain path's."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig

from blip2_kernels.encoder import Saving, Workload
from blip2_kernels.encoder.plan import cost
from blip2_kernels.mask import MaskMode
from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining

U, B, C = MaskMode.UNIMODAL, MaskMode.BIDIRECTIONAL, MaskMode.MULTIMODAL_CAUSAL
WORDS, PADDED = 12, 32
SMALL = dict(
    vocab_size=128,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    encoder_hidden_size=12,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def build(*, device: str = "cpu", use_fused: bool = True, **overrides) -> Blip2ForPreTraining:
    """A stage-1 model; BERT-base with 32 queries unless sizes are given."""
    fields = {"num_query_tokens": 5, "image_text_hidden_size": 8} if overrides else {}
    qformer = Blip2QFormerConfig(**({"vocab_size": 30523} | overrides), use_qformer_text_input=True)
    with torch.device(device):
        return Blip2ForPreTraining(Blip2PreTrainingConfig(qformer, **fields), use_fused=use_fused).eval()


def batch(model: Blip2ForPreTraining, samples: int, tokens: int, device: str = "cpu") -> dict:
    """Captions of 12 tokens padded to 32, and negatives, so that nothing is drawn."""
    width = model.config.qformer.encoder_hidden_size
    mask = (torch.arange(PADDED) < WORDS).long().expand(samples, -1)
    other = (torch.arange(samples) + 1) % samples
    return {
        "input_ids": torch.ones(samples, PADDED, dtype=torch.long, device=device),
        "attention_mask": mask.contiguous().to(device),
        "image_features": torch.zeros(samples, tokens, width, device=device),
        "negatives": (other.to(device), other.to(device)),
    }


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def stage1_closed_form(model: Blip2ForPreTraining, samples: int, tokens: int) -> int:
    """Forward and backward: two passes by the plan's closed form, and the heads."""
    encoder, config = model.qformer.fused_encoder, model.config
    queries, width = config.num_query_tokens, config.qformer.hidden_size
    one, every = samples * WORDS, samples * PADDED
    images = dict(images=samples, image_tokens=tokens, gradients=True)
    first = Workload(
        samples, queries, (U, C), (one,) * 2, (every,) * 2, keep_texts=("first", "all"), **images
    )
    matching = dict(keep_texts=("none",), projected=True, **images)
    second = Workload(3 * samples, queries, (B,), (3 * one,), (3 * every,), **matching)
    total = 0
    for work in (first, second):
        decisions = encoder.plan.decisions(work, encoder.architecture)
        applied = {saving: decision.applies for saving, decision in decisions.items()}
        total += cost(encoder.architecture, work, applied).flops
    labelled = samples * (WORDS if encoder.plan.forced.get(Saving.SUPERVISED_ROWS) is False else WORDS - 1)
    if encoder.plan.forced.get(Saving.PACKED_TEXT) is False:
        labelled = every
    head = labelled * (width * width + width * config.qformer.vocab_size)
    features = (samples * queries + samples) * width * config.image_text_hidden_size
    similarities = 2 * samples * samples * queries * config.image_text_hidden_size
    match = 3 * samples * queries * width * 2
    return total + 6 * (head + features + similarities + match)


def stage1_step(model: Blip2ForPreTraining, samples: int, tokens: int, device: str = "cpu"):
    return lambda: model(**batch(model, samples, tokens, device)).loss.backward()


@pytest.mark.parametrize("off", [None, *Saving])
def test_the_closed_form_is_what_is_counted(off):
    model = build(**SMALL)
    if off is not None:
        model.qformer.fused_encoder.force(**{off.value: False})
    assert counted(stage1_step(model, 3, 11)) == stage1_closed_form(model, 3, 11)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "limit"), [(257, 0.50), (677, 0.40)])
def test_a_stage_1_step_costs_half_of_the_plain_path(tokens, limit):
    plain = counted(stage1_step(build(device="meta", use_fused=False), 2, tokens, "meta"))
    model = build()
    fused = counted(stage1_step(model, 2, tokens))
    assert fused == stage1_closed_form(model, 2, tokens)
    print(f"{fused / 2e9:.1f} of {plain / 2e9:.1f} GFLOP a pair: {fused / plain:.3f}")
    assert fused <= limit * plain


def documented(column: int) -> dict[str, float]:
    """A column of the table of GFLOP a pair in docs/savings.md, by saving."""
    text = (Path(__file__).parents[2] / "docs" / "savings.md").read_text()
    rows = text.split("| off |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: float(row[column]) for row in cells}


@pytest.mark.parametrize(("tokens", "column"), [(257, 1), (677, 2)])
def test_what_each_saving_saves_is_what_the_documentation_says(tokens, column):
    """By the closed form, which is what is counted with any saving off (above)."""
    model = build(device="meta")
    encoder, whole = model.qformer.fused_encoder, stage1_closed_form(model, 2, tokens)
    found = {}
    for saving in Saving:
        encoder.force(**{saving.value: False})
        found[saving.value] = (stage1_closed_form(model, 2, tokens) - whole) / 2e9
        encoder.force(**{saving.value: None})
    print(tokens, {name: f"{saved:.2f}" for name, saved in found.items()})
    assert {name: round(saved, 2) for name, saved in found.items() if saved} == documented(column)


def rerank(model: Blip2ForPreTraining, texts: int, tokens: int, device: str = "cpu"):
    def call() -> None:
        inputs = batch(model, texts, tokens, device)
        features = inputs["image_features"][:1]
        index = torch.zeros(texts, dtype=torch.int32, device=device)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        model.match(model.get_multimodal_features(**text, image_features=features, image_index=index))

    return torch.no_grad()(call)


@pytest.mark.slow
def test_reranking_an_image_costs_less_than_half():
    plain = counted(rerank(build(device="meta", use_fused=False).requires_grad_(False), 32, 257, "meta"))
    fused = counted(rerank(build().requires_grad_(False), 32, 257))
    print(f"{fused / plain:.3f} of the plain path")
    assert fused <= 0.46 * plain


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "limit"), [(257, 0.79), (677, 0.66), (2056, 0.56)])
@torch.no_grad()
def test_reading_an_image_in_the_absorbed_form(tokens, limit):
    plain = build(device="meta", use_fused=False).requires_grad_(False)
    features = torch.zeros(2, tokens, 1408)
    whole = counted(lambda: plain.encode_image(features.to("meta")))
    model = build().requires_grad_(False)
    fused = counted(lambda: model.encode_image(features))
    work = Workload(2, 32, images=2, image_tokens=tokens)
    encoder = model.qformer.fused_encoder
    decisions = encoder.plan.decisions(work, encoder.architecture)
    assert decisions[Saving.ABSORBED].applies
    applied = {saving: decision.applies for saving, decision in decisions.items()}
    assert fused == cost(encoder.architecture, work, applied).flops
    print(f"{fused / whole:.3f} of the plain path")
    assert fused <= limit * whole


def test_a_pass_with_a_saving_less_would_be_noticed():
    """The canary of the limits above: without one projection for all passes, half is exceeded."""
    model = build(device="meta")
    limit = 0.5 * counted(stage1_step(build(device="meta", use_fused=False), 2, 257, "meta"))
    assert stage1_closed_form(model, 2, 257) < limit
    model.qformer.fused_encoder.force(project_once=False)
    assert stage1_closed_form(model, 2, 257) > limit


def test_a_fifth_pass_that_is_run_would_be_noticed():
    """The canary of the counter: a pass over the texts that nobody reads, and the closed form is exceeded."""
    model = build(**SMALL)
    expected = stage1_closed_form(model, 3, 11)
    step, inputs = stage1_step(model, 3, 11), batch(model, 3, 11)

    def with_a_fifth_pass() -> None:
        step()
        model.text_hidden(inputs["input_ids"], inputs["attention_mask"])

    found = counted(with_a_fifth_pass)
    architecture, rows = model.qformer.fused_encoder.architecture, 3 * WORDS
    projections = 4 * architecture.hidden**2 + 2 * architecture.hidden * SMALL["intermediate_size"]
    # At least what its first two layers multiply; of the last one a row a text is kept.
    assert found - expected >= 2 * 2 * rows * projections
