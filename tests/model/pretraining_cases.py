"""A small stage-1 model and batches for it, shared by the tests of pre-training."""

import pytest
import torch
from naive import RankBatch
from torch import Tensor
from transformers import Blip2QFormerConfig

from blip2_kernels.model.config import Blip2PreTrainingConfig
from blip2_kernels.model.pretraining import Blip2ForPreTraining

IMAGE_WIDTH, IMAGE_TOKENS, VOCABULARY, QUERIES, POSITIONS = 12, 5, 37, 3, 16
PAD, CLS, SEP = 0, 1, 2
BOTH_PATHS = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
LOSSES = ("itc", "itm", "itg")


def small_config(*, dropout: float = 0.1, **overrides) -> Blip2PreTrainingConfig:
    qformer = Blip2QFormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        encoder_hidden_size=IMAGE_WIDTH,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        use_qformer_text_input=True,
    )
    fields = {"num_query_tokens": QUERIES, "image_text_hidden_size": 8, "max_text_length": 10}
    return Blip2PreTrainingConfig(
        qformer, **{**fields, "cls_token_id": CLS, "sep_token_id": SEP, **overrides}
    )


def small_model(
    *, use_fused: bool = False, seed: int = 0, dtype=torch.float32, **config
) -> Blip2ForPreTraining:
    """In eval mode, with weights large enough for attention to be far from even and no norm an identity."""
    model = Blip2ForPreTraining(small_config(**config), use_fused=use_fused)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(parameter + noise if "norm" in name.lower() else noise)
    return model.to(dtype).eval()


def small_batch(batch: int = 4, *, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Texts of all lengths from 2 to `length`, padded on the right, and image features."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 2 + (torch.arange(batch) * 3 + seed) % (length - 1)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(SEP + 1, VOCABULARY - 1, (batch, length), generator=generator)
    ids[:, 0] = CLS
    ids[torch.arange(batch), lengths - 1] = SEP
    features = torch.randn(batch, IMAGE_TOKENS, IMAGE_WIDTH, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "image_features": features}


def some_negatives(batch: int, ranks: int = 1, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Other samples, of other ranks too, in no particular order."""
    total = batch * ranks
    own = torch.arange(batch) + rank * batch
    return (own + 1 + torch.arange(batch) % (total - 1)) % total, (own + total - 1) % total


def rank_batch(inputs: dict, negatives: tuple[Tensor, Tensor]) -> RankBatch:
    ids = inputs.get("image_ids")
    return RankBatch(
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["image_features"],
        (negatives[0].tolist(), negatives[1].tolist()),
        None if ids is None else ids.tolist(),
    )


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of a loss for every parameter, zeros where it does not depend on one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for name, parameter, grad in zip(names, parameters, grads, strict=True)
    }
