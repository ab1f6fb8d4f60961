"""Small Q-Formers and inputs that the Q-Former's tests share."""

import pytest
import torch
from torch import Tensor
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig

from blip2_kernels.model.qformer import QFormerModel

WIDTH, IMAGE_WIDTH, VOCABULARY, POSITIONS = 32, 24, 61, 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": IMAGE_WIDTH,
    "max_position_embeddings": POSITIONS,
}
BOTH_PATHS = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
PADDINGS = ["none", "right", "left", "scattered"]


def blip2_config(**overrides) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(**{**SIZES, "use_qformer_text_input": True, **overrides})


def instruct_config(**overrides) -> InstructBlipQFormerConfig:
    return InstructBlipQFormerConfig(**{**SIZES, **overrides})


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough for attention to be far from uniform, and no LayerNorm the identity.

    LayerNorm weights stay near 1: smaller ones shrink what tells the rows of a sample apart, and a mix-up
    of rows would go unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(0, 0.2, generator=generator)
    for part in module.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.weight += 1
    return module


def build(config, use_fused: bool = False, seed: int = 0) -> QFormerModel:
    return randomise(QFormerModel(config, use_fused=use_fused), seed).eval()


def text_mask(padding: str, batch: int, length: int) -> Tensor:
    """A 0/1 mask [B, T]; sample 0 keeps every token, each further one loses one more."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for sample in range(1, batch):
        dropped = min(2 * sample, length - 1)
        if padding == "right":
            mask[sample, length - dropped :] = 0
        elif padding == "left":
            mask[sample, :dropped] = 0
        elif padding == "scattered":
            mask[sample, 1 : 2 * dropped : 2] = 0
    return mask


def inputs(batch: int, queries: int, tokens: int, image_tokens: int = 9, seed: int = 1):
    """Queries, token ids, images and an image mask that hides the last tokens of every sample but the
    first."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    query_tokens = torch.randn(batch, queries, WIDTH, generator=generator)
    ids = torch.randint(1, VOCABULARY, (batch, tokens), generator=generator)
    images = torch.randn(batch, image_tokens, IMAGE_WIDTH, generator=generator)
    image_mask = torch.ones(batch, image_tokens, dtype=torch.long)
    for sample in range(1, batch):
        image_mask[sample, max(image_tokens - 2 * sample, 1) :] = 0
    return query_tokens, ids, images, image_mask


def with_queries(mask: Tensor, queries: int) -> Tensor:
    return torch.cat([mask.new_ones(mask.shape[0], queries), mask], dim=1)


def run_joint(model: QFormerModel, query_tokens, text, images, **options) -> Tensor:
    queries = query_tokens.shape[1]
    rows = torch.cat([query_tokens, text], dim=1)
    return model(rows, query_length=queries, encoder_hidden_states=images, **options).last_hidden_state
