"""The three losses of stage 1 (BLIP-2, section 3.1), as LAVIS computes them.

Each function returns this rank's loss such that the mean over ranks is the loss of the whole batch, which is
what the averaging of gradients by DistributedDataParallel needs.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_kernels.checks import (
    FLOATING,
    check_binary,
    check_int,
    check_probability,
    check_range,
    check_tensor,
    describe,
    values_are_free,
)
from blip2_kernels.layout import MASK_DTYPES

from .config import ITC_GRADIENTS, LM_NORMALISATIONS, check_choice
from .distributed import all_gather, all_gather_with_grad, get_world_size, global_sum
from .qformer_text import TOKEN_IDS

IGNORE_INDEX = -100


def contrastive_similarities(
    image_embeds: Tensor,
    text_embeds: Tensor,
    temperature: Tensor,
    *,
    gradient: Literal["local", "full"] = "local",
) -> tuple[Tensor, Tensor]:
    """Similarities of own images and texts to those of all ranks: the best query counts (ITC).

    Args:
        image_embeds: [B, Q, E] of length 1.
        text_embeds: [B, E] of length 1.
        temperature: floating [], what similarities are divided by, above 0.
        gradient: "local" treats the gathered side as constant, own rows included, as LAVIS does; "full" sends
            gradients back to the ranks it came from. With one rank nothing is gathered and both sides get
            their gradient either way.

    Returns:
        `sim_i2t` and `sim_t2i`, each [B, n], n = world size * B.

    Raises:
        TypeError, ValueError: tensors of the wrong kind, or that do not belong together; (on the CPU) a
        temperature that is not above 0; another word for `gradient`.
    """
    check_tensor("image_embeds", image_embeds, ["B", "Q", "E"], FLOATING)
    shape = [image_embeds.shape[0], image_embeds.shape[2]]
    check_tensor("text_embeds", text_embeds, shape, [image_embeds.dtype], image_embeds.device)
    check_tensor("temperature", temperature, [], FLOATING)
    # A NaN passes: it is the loss that says so, with the step.
    if values_are_free(temperature.device) and bool(temperature <= 0):
        raise ValueError(f"temperature: expected a number > 0, got {temperature.item():g}")
    check_choice("gradient", gradient, ITC_GRADIENTS)
    gather = all_gather_with_grad if gradient == "full" else all_gather
    all_images, all_texts = gather(image_embeds), gather(text_embeds)
    # [B, Q, n] and [B, n, Q]: the maximum is over the queries of the image, whichever side it stands on.
    sim_i2t = (image_embeds @ all_texts.t()).max(dim=1).values
    sim_t2i = torch.einsum("be,nqe->bnq", text_embeds, all_images).max(dim=2).values
    return sim_i2t / temperature, sim_t2i / temperature


def contrastive_loss(
    sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """Cross entropy of images to texts and texts to images, averaged (ITC).

    The target of a row is 1 - `label_smoothing`, shared by its positives, plus `label_smoothing` spread over
    all. With one positive a row that is cross entropy with label smoothing; with several (the same image
    under several captions) it is LAVIS's soft target.

    Args:
        sim_i2t, sim_t2i: [B, n] from `contrastive_similarities`.
        positives: bool [B, n], at least one a row.
        label_smoothing: in [0, 1).

    Returns:
        [], fp32 or wider.

    Raises:
        TypeError, ValueError: tensors of the wrong kind or shape, an empty batch, (on the CPU) a row without
        a positive, or a smoothing out of range.
    """
    check_tensor("sim_i2t", sim_i2t, ["B", "n"], FLOATING)
    if sim_i2t.numel() == 0:
        raise ValueError(f"sim_i2t: expected at least one pair, got {describe(sim_i2t)}")
    check_tensor("sim_t2i", sim_t2i, sim_i2t.shape, [sim_i2t.dtype], sim_i2t.device)
    check_tensor("positives", positives, sim_i2t.shape, [torch.bool], sim_i2t.device)
    if values_are_free(positives.device) and not bool(positives.any(dim=1).all()):
        row = int(positives.any(dim=1).logical_not().nonzero()[0])
        raise ValueError(f"positives: expected at least one a row, got none in row {row}")
    check_probability("label_smoothing", label_smoothing)
    dtype = torch.promote_types(sim_i2t.dtype, torch.float32)
    targets = positives.to(dtype)
    targets = (1 - label_smoothing) * targets / targets.sum(dim=1, keepdim=True)
    targets = targets + label_smoothing / positives.shape[1]
    return (F.cross_entropy(sim_i2t.to(dtype), targets) + F.cross_entropy(sim_t2i.to(dtype), targets)) / 2


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of (no match, match), averaged over the labelled rows of all ranks (ITM).

    Args:
        logits: [S, 2].
        labels: int64 [S], 0 or 1, or -100 for rows that do not count.

    Returns:
        [], fp32 or wider; 0 (with a graph) where no row counts.

    Raises:
        TypeError, ValueError: tensors of the wrong kind or shape, or (on the CPU) another label.
    """
    check_tensor("logits", logits, ["S", 2], FLOATING)
    _check_labels(labels, logits)
    count = global_sum((labels != IGNORE_INDEX).sum())
    return _sum_cross_entropy(logits, labels) * get_world_size() / count.clamp(min=1)


def caption_labels(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int) -> Tensor:
    """What each text row should predict: the token behind it.

    Args:
        input_ids: integers [B, T].
        attention_mask: 0/1 [B, T].
        pad_token_id: never a label.

    Returns:
        int64 [B, T]: -100 in the last column, where the next token is padding, and in padding rows.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape, or (on the CPU) a mask value other than
        0 and 1.
    """
    check_tensor("input_ids", input_ids, ["B", "T"], TOKEN_IDS)
    check_tensor("attention_mask", attention_mask, input_ids.shape, MASK_DTYPES, input_ids.device)
    check_binary("attention_mask", attention_mask)
    check_int("pad_token_id", pad_token_id, 0)
    mask = attention_mask != 0
    targets = input_ids[:, 1:].long()
    supervised = mask[:, 1:] & mask[:, :-1] & (targets != pad_token_id)
    return F.pad(targets.masked_fill(~supervised, IGNORE_INDEX), (0, 1), value=IGNORE_INDEX)


def caption_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    normalisation: Literal["rank", "global"] = "rank",
) -> Tensor:
    """Cross entropy of the next token with label smoothing, averaged over tokens (ITG).

    Args:
        logits: [..., vocab].
        labels: int64 [...] aligned with them (`caption_labels`), -100 for rows that do not count.
        label_smoothing: in [0, 1).
        normalisation: "rank" divides by the labelled tokens of this rank, "global" by those of all ranks.

    Returns:
        [], fp32 or wider; 0 (with a graph) where no row counts.

    Raises:
        TypeError, ValueError: tensors of the wrong kind or shape, (on the CPU) a label outside the
        vocabulary, a smoothing out of range, or another word for `normalisation`.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise (ValueError if isinstance(logits, Tensor) else TypeError)(
            f"logits: expected a tensor [..., vocab], got {describe(logits)}"
        )
    check_tensor("logits", logits, logits.shape, FLOATING)
    _check_labels(labels, logits)
    check_probability("label_smoothing", label_smoothing)
    check_choice("normalisation", normalisation, LM_NORMALISATIONS)
    count, ranks = (labels != IGNORE_INDEX).sum(), 1
    if normalisation == "global":
        count, ranks = global_sum(count), get_world_size()
    total = _sum_cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing)
    return total * ranks / count.clamp(min=1)


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    """Labels int64 [...] of logits [..., classes]: -100 or a class."""
    check_tensor("labels", labels, logits.shape[:-1], [torch.int64], logits.device)
    check_range("labels", labels, logits.shape[-1], ignored=IGNORE_INDEX)


def _sum_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum"
    )
