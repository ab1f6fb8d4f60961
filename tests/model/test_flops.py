"""What a step of the reference path costs at full size: counted, never timed.

BERT-base Q-Former (12 layers, every second one with cross-attention), 32 queries, text padded to 32, image
width 1408. A multiplication and an addition of a matrix product are one FLOP each; softmax, norms, lookups
and activations count nothing. Per image-text pair of a batch, forward, in GFLOP:

    image tokens   image pass   text pass   matching, 3 rows   caption behind cache   heads      sum
             257        12.75        5.47              54.89                   5.51    1.55    80.17
             677        23.90        5.47              88.33                   5.51    1.55   124.77

The language-modelling head is counted on all 32 rows, as LAVIS computes it; without it the sums are 78.6 and
123.2.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining

C, INNER, LAYERS, CROSS, Q, T, WIDTH, VOCABULARY, E = 768, 3072, 12, 6, 32, 32, 1408, 30523, 256
STATED = {257: 80.1e9, 677: 124.7e9}
BATCH = 2


def layers(rows: int, keys: int) -> int:
    """Multiply-adds of self-attention and feed-forward of all layers, `rows` rows attending to `keys`."""
    return LAYERS * (4 * rows * C * C + 2 * rows * keys * C + 2 * rows * C * INNER)


def cross_attention(image_tokens: int) -> int:
    """Multiply-adds of all cross-attention layers for one image, its keys and values included."""
    return CROSS * (2 * Q * C * C + 2 * image_tokens * WIDTH * C + 2 * Q * image_tokens * C)


def closed_form(image_tokens: int) -> dict[str, float]:
    """FLOPs of one pair in a batch of `BATCH`, by part."""
    parts = {
        "image": layers(Q, Q) + cross_attention(image_tokens),
        "text": layers(T, T),
        "matching": 3 * (layers(Q + T, Q + T) + cross_attention(image_tokens)),
        "caption": layers(T, Q + T),
        "head": T * C * C + T * C * VOCABULARY,
        "projections": Q * C * E + C * E + 3 * Q * C * 2,
        "similarities": 2 * Q * E * BATCH,
    }
    return {name: 2.0 * value for name, value in parts.items()}


def counted(image_tokens: int) -> float:
    """FLOPs of one pair, counted on tensors without data."""
    qformer = Blip2QFormerConfig(vocab_size=VOCABULARY, use_qformer_text_input=True)
    with torch.device("meta"):
        model = Blip2ForPreTraining(Blip2PreTrainingConfig(qformer)).eval().requires_grad_(False)
        inputs = {
            "input_ids": torch.ones(BATCH, T, dtype=torch.long),
            "attention_mask": torch.ones(BATCH, T, dtype=torch.long),
            "image_features": torch.empty(BATCH, image_tokens, WIDTH),
            "negatives": (torch.ones(BATCH, dtype=torch.long), torch.ones(BATCH, dtype=torch.long)),
        }
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
    return counter.get_total_flops() / BATCH


@pytest.mark.parametrize("image_tokens", sorted(STATED))
def test_the_reference_path_costs_what_is_stated(image_tokens):
    flops = counted(image_tokens)
    assert flops == pytest.approx(STATED[image_tokens], rel=0.02)
    assert flops == pytest.approx(sum(closed_form(image_tokens).values()), rel=1e-9)


def test_a_fifth_pass_would_be_noticed():
    parts = closed_form(257)
    assert parts["text"] > 0.02 * STATED[257], "the smallest pass exceeds the tolerance"
