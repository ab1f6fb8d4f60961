"""From a picture to an encoder's input: decoding, resizing and normalising with PIL or tensors only.

torchvision, which transformers' image processors need, is never required.
"""

import io
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from blip2_kernels.checks import check_bool, check_finite, check_int, describe, values_are_free

__all__ = ["CLIP_MEAN", "CLIP_STD", "ImagePreprocessing", "open_image"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OVERSHOOT = 0.1
"""How far bicubic resizing by the caller may have taken a floating picture out of [0, 1]."""
# PIL's resampling filters by the names torch.nn.functional.interpolate gives them; PIL always antialiases.
PIL_FILTERS = {"nearest": 0, "bilinear": 2, "bicubic": 3}


class UnfitPixelsError(ValueError):
    """Pictures that an encoder does not take."""


def open_image(source: str | Path | bytes) -> Any:
    """Decode an image file completely, to 8 bits a channel, upright.

    16-bit and floating images are scaled to 0…255 (PIL alone would cut everything above 255 off).

    Args:
        source: a path, or the file's bytes.

    Returns:
        A loaded `PIL.Image.Image`, turned upright by its EXIF orientation, in one of PIL's 8-bit modes
        (palette and alpha are left to the preprocessing).

    Raises:
        ImportError: Pillow is not installed, or lacks a library that this file needs.
        MemoryError: no room for the picture.
        OSError: no such file, not an image (PIL's `UnidentifiedImageError` is an OSError), cut short, too
            large to be real, or with pixels that are not finite.
        TypeError: neither a path nor bytes.
    """
    if not isinstance(source, str | Path | bytes):
        raise TypeError(f"source: expected a path or the bytes of an image file, got {describe(source)}")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("Pillow: needed to decode images; install it with `pip install pillow`") from error
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return _eight_bits(ImageOps.exif_transpose(image))
    except (OSError, ImportError, MemoryError):
        raise
    # A broken file surfaces from PIL's plugins as whatever their parsing trips over: a RuntimeError of the
    # AVIF decoder, a NotImplementedError of the DDS one, a struct.error, ... No list of them is complete.
    except Exception as error:
        raise OSError(f"cannot decode image: {str(error) or type(error).__name__}") from error


def _eight_bits(image: Any) -> Any:
    """A 16-bit, 32-bit or floating picture as 8-bit grey; any other one as it is."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    from PIL import Image

    low, high = image.getextrema()
    if image.mode.startswith("I;16"):
        scale = 255 / 65535
    elif high <= 1 and image.mode == "F":
        scale = 255.0
    elif high <= 255:
        scale = 1.0
    else:
        scale = 255 / max(65535, high)
    pixels = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32)
    if not bool(torch.isfinite(pixels).all()):
        raise OSError(f"pixels are not finite (smallest {low}, largest {high})")
    levels = (pixels * scale).round().clamp(0, 255).to(torch.uint8)
    return Image.frombytes("L", image.size, levels.numpy().tobytes())


@dataclass(frozen=True)
class ImagePreprocessing:
    """How pictures become `pixel_values`: resize, scale to [0, 1], subtract `mean`, divide by `std`.

    Attributes:
        image_size: (height, width) in pixels, or one int for both.
        mean, std: a number a channel, of pixels in [0, 1]. The defaults are CLIP's, which BLIP-2 uses.
        interpolation: "bicubic", "bilinear" or "nearest"; antialiased when shrinking, except "nearest".
        crop: False stretches the whole picture to `image_size`, as BLIP-2 does; True keeps its proportions,
            fills `image_size` and cuts the centre out, as CLIP does.
        background: RGB in [0, 255] that transparent pictures are laid on.

    Raises:
        TypeError, ValueError: a size, mean, std, interpolation or background that cannot be.
    """

    image_size: tuple[int, int] | int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"
    crop: bool = False
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        size = self.image_size
        if not isinstance(size, int) and (not isinstance(size, tuple | list) or len(size) != 2):
            raise TypeError(f"image_size: expected (height, width) or one int, got {size!r}")
        sides = (size, size) if isinstance(size, int) else tuple(size)
        for side in sides:
            check_int("image_size", side, 1)
        object.__setattr__(self, "image_size", sides)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or not values:
                raise TypeError(f"{name}: expected a tuple of one number a channel, got {describe(values)}")
            for value in values:
                check_finite(name, value)
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if len(self.mean) != len(self.std):
            raise ValueError(f"std: expected {len(self.mean)} numbers as mean, got {len(self.std)}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected numbers > 0, got {self.std}")
        if self.interpolation not in PIL_FILTERS:
            raise ValueError(
                f"interpolation: expected one of {', '.join(PIL_FILTERS)}, got {self.interpolation!r}"
            )
        check_bool("crop", self.crop)
        if not isinstance(self.background, tuple | list):
            raise TypeError(f"background: expected (red, green, blue), got {describe(self.background)}")
        background = tuple(self.background)
        if len(background) != 3:
            raise ValueError(f"background: expected three numbers (red, green, blue), got {background}")
        for value in background:
            check_int("background", value, 0, 255)
        object.__setattr__(self, "background", background)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ImagePreprocessing":
        """Read a transformers `preprocessor_config.json` (given as a dict).

        Raises:
            TypeError: not a mapping, or an entry of the wrong kind.
            ValueError: an entry says something this class does not do (no resizing, no rescaling, a crop of
                another size than the one resized to).
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config: expected a mapping, got {describe(config)}")
        given = {name: value for name, value in config.items() if value is not None}
        size = given.get("size", 224)
        crop_size = given.get("crop_size", size)
        crop = check_bool("do_center_crop", given.get("do_center_crop", False))
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not check_bool(name, given.get(name, True)):
                raise ValueError(f"{name}: expected True, got False")
        factor = check_finite("rescale_factor", given.get("rescale_factor", 1 / 255))
        if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
            raise ValueError(f"rescale_factor: expected 1/255, got {factor}")
        sides = _sides("crop_size", crop_size) if crop else _sides("size", size)
        if crop and min(_sides("size", size)) != min(sides):
            raise ValueError(f"crop_size: expected {size}, the size resized to, got {crop_size}")
        if not crop and isinstance(size, Mapping) and "shortest_edge" in size:
            raise ValueError(f"size: expected height and width when do_center_crop is False, got {size}")
        names = {number: name for name, number in PIL_FILTERS.items()}
        resample = check_int("resample", given.get("resample", 3), 0)
        if resample not in names:
            raise ValueError(f"resample: expected one of {sorted(names)}, got {resample}")
        mean, std = given.get("image_mean", CLIP_MEAN), given.get("image_std", CLIP_STD)
        for name, values in (("image_mean", mean), ("image_std", std)):
            if not isinstance(values, list | tuple):
                raise TypeError(f"{name}: expected a list of one number a channel, got {describe(values)}")
        return cls(sides, tuple(mean), tuple(std), names[resample], crop)

    def __call__(self, image: Any) -> Tensor:
        """Preprocess one picture.

        Args:
            image: a PIL image of any mode; or a tensor [channels, height, width], uint8 in [0, 255] or
                floating in [0, 1].

        Returns:
            float32 [channels, image_size[0], image_size[1]]; on the CPU for a PIL image.

        Raises:
            TypeError: something else, or a tensor of another dtype.
            ValueError: a tensor of another rank or number of channels, or an empty one, or (on the CPU)
            floating values that are not of [0, 1].
        """
        pixels = self._from_tensor(image) if isinstance(image, Tensor) else self._from_pil(image)
        statistics = torch.tensor([self.mean, self.std], device=pixels.device)[:, :, None, None]
        return (pixels - statistics[0]) / statistics[1]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Size to resize to before the crop."""
        goal_height, goal_width = self.image_size
        if not self.crop:
            return goal_height, goal_width
        scale = max(goal_height / height, goal_width / width)
        return max(goal_height, round(height * scale)), max(goal_width, round(width * scale))

    def _cut(self, pixels: Tensor) -> Tensor:
        height, width = self.image_size
        top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
        return pixels[..., top : top + height, left : left + width]

    def _from_tensor(self, image: Tensor) -> Tensor:
        channels = len(self.mean)
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"image: expected uint8 or floating, got {describe(image)}")
        if image.dim() != 3 or image.shape[0] != channels or image.numel() == 0:
            raise ValueError(f"image: expected [{channels}, height, width], got {describe(image)}")
        pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        if image.dtype != torch.uint8 and values_are_free(image.device):
            low, high = float(pixels.min()), float(pixels.max())
            if not -OVERSHOOT <= low <= high <= 1 + OVERSHOOT:
                raise ValueError(
                    f"image: expected floating values in [0, 1], got {low:g} to {high:g} (0 to 255 is uint8)"
                )
        size = self._resized(*image.shape[1:])
        if size != tuple(image.shape[1:]):
            smooth = self.interpolation != "nearest"
            pixels = interpolate(
                pixels[None],
                size,
                mode=self.interpolation,
                antialias=smooth,
                align_corners=False if smooth else None,
            )[0]
            pixels = pixels.clamp(0, 1) if image.dtype == torch.uint8 else pixels
        return self._cut(pixels)

    def _from_pil(self, image: Any) -> Tensor:
        # Whoever holds a PIL image has imported PIL; whoever has not needs no PIL to be told so.
        pil = sys.modules.get("PIL.Image")
        if pil is None or not isinstance(image, pil.Image):
            raise TypeError(f"image: expected a PIL image or a tensor, got {describe(image)}")
        if len(self.mean) != 3:
            raise ValueError(f"image: expected a tensor of {len(self.mean)} channels, got a PIL image")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            ground = pil.new("RGBA", image.size, (*self.background, 255))
            ground.alpha_composite(image.convert("RGBA"))
            image = ground
        image = image.convert("RGB")
        height, width = self._resized(image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), PIL_FILTERS[self.interpolation])
        raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return self._cut(raw.view(height, width, 3).permute(2, 0, 1).float() / 255)


def _sides(name: str, size: Any) -> tuple[int, int]:
    """(height, width) of a `size` entry of transformers: a number, a pair, or named sides."""
    sides = size
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        sides = (size.get("height"), size.get("width")) if edge is None else (edge, edge)
        if None in sides:
            raise ValueError(f"{name}: expected height and width or shortest_edge, got {dict(size)}")
    elif not isinstance(size, list | tuple):
        sides = (size, size)
    if len(sides) != 2:
        raise ValueError(f"{name}: expected (height, width), got {size}")
    return check_int(name, sides[0], 1), check_int(name, sides[1], 1)
