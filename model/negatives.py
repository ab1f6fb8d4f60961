"""Hard negatives for image-text matching (BLIP-2, section 3.1, after ALBEF): who is wrongly thought alike.

Everything here is shared by the plain and the fused path, so that both see the same negatives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_kernels.checks import INTEGERS, check_device, check_int, check_tensor, describe, values_are_free

from .distributed import all_gather, get_rank, get_world_size

Negatives = tuple[Tensor, Tensor]
INDEX_DTYPES = INTEGERS
NO_NEGATIVE = -1


def positive_pairs(batch_size: int, image_ids: Tensor | None = None, *, device: torch.device) -> Tensor:
    """Which of all ranks' samples are positives of this rank's.

    Args:
        batch_size: B, samples of this rank.
        image_ids: integers [B], equal where two samples show the same image; None where all images differ.
        device: where to make the table.

    Returns:
        bool [B, n], n = world size * B: own pair, and where ids are given every pair with the same image.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value.
    """
    check_int("batch_size", batch_size, 0)
    device = check_device("device", device)
    if image_ids is not None:
        check_tensor("image_ids", image_ids, [batch_size], INDEX_DTYPES)
        return image_ids[:, None] == all_gather(image_ids)[None, :]
    own = torch.arange(batch_size, device=device) + get_rank() * batch_size
    return own[:, None] == torch.arange(batch_size * get_world_size(), device=device)[None, :]


@torch.no_grad()
def sample_hard_negatives(
    sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor, *, generator: torch.Generator | None = None
) -> Negatives:
    """Draw a negative image for each text and a negative text for each image.

    Each is drawn from the softmax of the contrastive similarities over what is no positive; the harder a pair
    is to tell from a true one, the likelier it is drawn. No gradient, no synchronisation.

    Args:
        sim_i2t: floating [B, n], own images against all texts, divided by the temperature.
        sim_t2i: floating [B, n], own texts against all images, divided by the temperature.
        positives: bool [B, n], never to be drawn (`positive_pairs`).
        generator: default torch's for the device.

    Returns:
        `image_index` int64 [B], the image drawn for each text, and `text_index` int64 [B], the text drawn for
        each image: numbers in [0, n), or -1 where everything is a positive.

    Raises:
        TypeError, ValueError: similarities or positives of the wrong kind or shape.
    """
    check_tensor("sim_i2t", sim_i2t, ["B", "n"])
    if not sim_i2t.is_floating_point():
        raise TypeError(f"sim_i2t: expected a floating [B, n], got {describe(sim_i2t)}")
    shape = list(sim_i2t.shape)
    check_tensor("sim_t2i", sim_t2i, shape, [sim_i2t.dtype], sim_i2t.device)
    check_tensor("positives", positives, shape, [torch.bool], sim_i2t.device)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {describe(generator)}")
    image_index = _draw(sim_t2i, positives, generator)
    return image_index, _draw(sim_i2t, positives, generator)


def _draw(sim: Tensor, positives: Tensor, generator: torch.Generator | None) -> Tensor:
    weights = sim.float().masked_fill(positives, -torch.inf).softmax(dim=1)
    # Rows of positives only have no softmax: any weights will do, their draw is discarded. Rows whose
    # similarities have become NaN draw evenly, so that the loss reports the NaN and not the sampler.
    usable = weights.isfinite().all(dim=1, keepdim=True)
    evenly = torch.where(positives.all(dim=1, keepdim=True), 1.0, (~positives).float())
    weights = torch.where(usable, weights, evenly)
    # As torch.multinomial draws one of each row, to the bit: the first to arrive of exponential times. But it
    # reads on the host, in some versions, whether its weights are sound, which these are.
    arrivals = torch.empty_like(weights).exponential_(generator=generator)
    drawn = (weights / arrivals).argmax(dim=1)
    return drawn.masked_fill(positives.all(dim=1), NO_NEGATIVE)


def check_negatives(negatives: object, positives: Tensor) -> Negatives:
    """Check negatives chosen by the caller.

    Args:
        negatives: a pair of integer tensors [B] of one dtype, `(image_index, text_index)` as
            `sample_hard_negatives` returns them.
        positives: bool [B, n].

    Returns:
        Both as int64 on the device of `positives`.

    Raises:
        TypeError: no pair, or tensors of another or of two dtypes.
        ValueError: a wrong shape; on the CPU also a number outside [-1, n) or one that points at a positive.
    """
    check_tensor("positives", positives, ["B", "n"], [torch.bool])
    if isinstance(negatives, str) or not isinstance(negatives, Sequence) or len(negatives) != 2:
        plain = isinstance(negatives, Sequence) and not isinstance(negatives, str)
        got = f"{len(negatives)} values" if plain else describe(negatives)
        raise TypeError(f"negatives: expected a pair (image_index, text_index), got {got}")
    batch = positives.shape[0]
    checked: list[Tensor] = []
    for name, index in zip(("image_index", "text_index"), negatives, strict=True):
        dtypes = INDEX_DTYPES if not checked else [negatives[0].dtype]
        check_tensor(f"negatives ({name})", index, [batch], dtypes)
        on_host = values_are_free(index.device)
        index = index.to(positives.device, torch.int64)
        if on_host:
            _check_values(f"negatives ({name})", index, positives)
        checked.append(index)
    return checked[0], checked[1]


def _check_values(name: str, index: Tensor, positives: Tensor) -> None:
    total = positives.shape[1]
    wrong = index[(index < NO_NEGATIVE) | (index >= total)]
    if wrong.numel():
        raise ValueError(f"{name}: expected values in [0, {total}), or -1 for none, got {wrong[0].item()}")
    hit = positives.gather(1, index.clamp(min=0)[:, None])[:, 0] & (index >= 0)
    if hit.any():
        row = int(hit.nonzero()[0])
        raise ValueError(f"{name}: expected no positive of the row, got {index[row].item()} in row {row}")
