"""Which image each sample looks at, and which of its tokens: checks shared by the ops that read images."""

import torch
from torch import Tensor

from ..checks import can_look, check_binary, check_tensor, describe
from ..layout import MASK_DTYPES

EVERY, LENGTHS, MASK = 0, 1, 2
"""How a kernel is told which tokens of an image are visible: all; the first, as many as its length says;
those whose mask byte is not 0."""


def visibility(visible: Tensor | None) -> int:
    """Which of these `visible` is: None, int32 [images] or 0/1 [images, tokens]."""
    return EVERY if visible is None else LENGTHS if visible.dim() == 1 else MASK


def check_image_index(index: object, samples: int, images: int, device: torch.device, validate: bool) -> None:
    """Check `image_index`, int32 [samples] or None (sample s looks at image s).

    Args:
        index: what the caller passed.
        samples: S.
        images: number of images.
        device: where it must live.
        validate: look at the values on any device; those of a CPU tensor are always looked at.

    Raises:
        TypeError: not an int32 tensor.
        ValueError: another shape or device, values outside [0, images), None where samples and images
            differ in number, or samples where there is no image.
    """
    if index is None:
        if images != samples:
            expected = f"int32 [{samples}] where {samples} samples meet {images} images"
            raise ValueError(f"image_index: expected {expected}, got None")
        return
    expected = f"int32 [{samples}] with values in [0, {images})"
    if not isinstance(index, Tensor) or index.dtype != torch.int32:
        raise TypeError(f"image_index: expected {expected}, got {describe(index)}")
    check_tensor("image_index", index, [samples], [torch.int32], device)
    if samples and not images:
        raise ValueError(f"image_index: expected int32 [0] where there is no image, got {describe(index)}")
    if can_look(device, validate) and samples:
        low, high = index.aminmax()
        if low < 0 or high >= images:
            raise ValueError(f"image_index: expected {expected}, got values in [{low}, {high}]")


def check_image_tokens(
    lengths: object, mask: object, images: int, tokens: int, device: torch.device, validate: bool
) -> None:
    """Check `image_lengths`, int32 [images] in [0, tokens], or `image_mask`, 0/1 [images, tokens].

    Raises:
        TypeError: not a tensor of an admissible dtype.
        ValueError: both were given, another shape or device, or values that do not fit.
    """
    if lengths is not None and mask is not None:
        raise ValueError("image_mask: expected None beside image_lengths, got both")
    if mask is not None:
        checked = check_tensor("image_mask", mask, [images, tokens], MASK_DTYPES, device)
        if can_look(device, validate):
            check_binary("image_mask", checked, force=True)
    if lengths is not None:
        checked = check_tensor("image_lengths", lengths, [images], [torch.int32], device)
        if can_look(device, validate) and images:
            low, high = checked.aminmax()
            if low < 0 or high > tokens:
                expected = f"values in [0, {tokens}]"
                raise ValueError(f"image_lengths: expected {expected}, got values in [{low}, {high}]")


def visible_tokens(lengths: Tensor | None, mask: Tensor | None, tokens: int) -> Tensor | None:
    """The image tokens that may be attended to, bool [images, tokens], or None for all."""
    if mask is not None:
        return mask != 0
    if lengths is not None:
        return torch.arange(tokens, device=lengths.device) < lengths[:, None]
    return None
