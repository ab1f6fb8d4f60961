"""Images and captions as a dataset that no broken file can stop.

An image that cannot be decoded is named, counted and passed over: in its place comes the next image of the
dataset that can be, so that a batch never shrinks (with several ranks, batches of unequal size would hang the
run), and which image that is depends on the files alone, not on workers or on what was read before.
"""

import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip2_kernels.checks import check_bool, check_finite, check_function, check_int, describe

from ..feature_cache import FeatureCache
from ..images import open_image
from .manifest import Manifest

logger = logging.getLogger(__name__)

SHOWN_SKIPPED = 10


class RandomResizedCrop:
    """Cuts a random part out of a picture, as LAVIS's training transform: `(image, generator) -> image`.

    Args:
        scale: share of the area that is kept, between the two.
        ratio: width over height of the part, between the two.
        flip: mirrors every second picture. Off by default: captions that say left and right would become
            wrong.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
    ) -> None:
        for name, pair in (("scale", scale), ("ratio", ratio)):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"{name}: expected two numbers (low, high), got {pair!r}")
            for number in pair:
                check_finite(name, number)
        check_bool("flip", flip)
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < low <= high <= 1, got {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio: expected 0 < low <= high, got {ratio}")
        self.scale, self.ratio, self.flip = scale, ratio, flip

    def __call__(self, image: Any, generator: random.Random) -> Any:
        width, height = image.size
        area = width * height * generator.uniform(*self.scale)
        ratio = generator.uniform(*self.ratio)
        crop_width = min(width, max(1, round((area * ratio) ** 0.5)))
        crop_height = min(height, max(1, round((area / ratio) ** 0.5)))
        left, top = generator.randint(0, width - crop_width), generator.randint(0, height - crop_height)
        image = image.crop((left, top, left + crop_width, top + crop_height))
        if self.flip and generator.random() < 0.5:
            from PIL import Image

            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class ImageTextDataset(Dataset):
    """Image-caption pairs for both stages.

    A sample is `{"pixel_values": [3, H, W] or "image_features": [tokens, width], "caption": str, "image_id":
    int, "index": int}`; pairs of one image share their `image_id`.

    Args:
        manifest: from :func:`~blip2_kernels.model.data.manifest.read_manifest`.
        preprocess: picture → `pixel_values` (`ImagePreprocessing`, or any function of a PIL image); or
        feature_cache: a `FeatureCache`, from which samples take `image_features`. Images are encoded now,
            once.
        captions: `"each"`: one sample a caption; `"random"`: one sample an image, with one of its captions,
            another one each epoch.
        augment: `(image, random.Random) -> image` before `preprocess`, e.g. :class:`RandomResizedCrop`.
        seed: of captions and augmentation. What a sample looks like depends on seed, epoch and index alone.
        progress: called as `progress(done, total)` while features are encoded.

    Raises:
        TypeError, ValueError: neither or both of `preprocess` and `feature_cache`; another word for
            `captions`; no image at all that can be decoded (when samples are read, or features encoded).
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        preprocess: Callable[[Any], Tensor] | None = None,
        feature_cache: FeatureCache | None = None,
        captions: str = "each",
        augment: Callable[[Any, random.Random], Any] | None = None,
        seed: int = 0,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        if not isinstance(manifest, Manifest):
            raise TypeError(f"manifest: expected a Manifest (see read_manifest), got {describe(manifest)}")
        if (preprocess is None) == (feature_cache is None):
            got = "neither" if preprocess is None else "both"
            raise ValueError(f"preprocess, feature_cache: expected exactly one of them, got {got}")
        if captions not in ("each", "random"):
            raise ValueError(f"captions: expected 'each' or 'random', got {captions!r}")
        for name, function in (("preprocess", preprocess), ("augment", augment), ("progress", progress)):
            check_function(name, function)
        if feature_cache is not None and not isinstance(feature_cache, FeatureCache):
            raise TypeError(f"feature_cache: expected a FeatureCache or None, got {describe(feature_cache)}")
        check_int("seed", seed, 0)
        if augment is not None and preprocess is None:
            raise ValueError("augment: expected None with a feature_cache, whose features are fixed")
        self.manifest, self.preprocess, self.feature_cache = manifest, preprocess, feature_cache
        self.captions, self.augment, self.seed, self.epoch = captions, augment, seed, 0
        self._by_image = manifest.captions_of_images() if captions == "random" else []
        # Shared memory, so that what a DataLoader's workers find out is known here too.
        self._broken = torch.zeros(len(manifest.images), dtype=torch.uint8).share_memory_()
        self._hashes: list[str | None] = []
        if feature_cache is not None:
            report = feature_cache.prepare(manifest.images, progress=progress)
            self._hashes = report.hashes
            for skipped in report.skipped:
                self._mark(skipped.index, skipped.reason)

    def __len__(self) -> int:
        """Samples an epoch, those of broken images included."""
        return len(self._by_image) or len(self.manifest.pairs)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = check_int("epoch", epoch, 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        length = len(self)
        check_int("index", index, -sys.maxsize)
        if not -length <= index < length:
            raise IndexError(f"index: expected a value in [{-length}, {length}), got {index}")
        index %= length
        for step in range(length):
            place = (index + step) % length
            image = place if self.captions == "random" else self.manifest.pairs[place].image
            if self._broken[image]:
                continue
            generator = random.Random(f"{self.seed} {self.epoch} {place}")
            try:
                picture = self._picture(image, generator)
            except (OSError, ValueError) as error:
                self._mark(image, str(error))
                continue
            if self.captions == "random":
                caption = generator.choice(self._by_image[image])
            else:
                caption = self.manifest.pairs[place].caption
            name = "image_features" if self.feature_cache is not None else "pixel_values"
            return {name: picture, "caption": caption, "image_id": image, "index": place}
        raise ValueError(f"no image of {len(self.manifest.images)} can be decoded; {self.summary()}")

    def _picture(self, image: int, generator: random.Random) -> Tensor:
        if self.preprocess is None:
            key = self._hashes[image]
            return self.feature_cache.load([key])[0]
        picture = open_image(self.manifest.images[image])
        if self.augment is not None:
            picture = self.augment(picture, generator)
        return self.preprocess(picture)

    def _mark(self, image: int, reason: str) -> None:
        self._broken[image] = 1
        logger.warning("skipping image %s: %s", self.manifest.images[image], reason)

    @property
    def skipped(self) -> list[Path]:
        """Images found broken so far (by this process and its workers), in the order of the manifest."""
        return [self.manifest.images[i] for i in self._broken.nonzero().flatten().tolist()]

    def summary(self) -> str:
        """`1204 images, 3200 captions; 2 skipped: a.jpg, b.png`."""
        skipped, manifest = self.skipped, self.manifest
        text = f"{len(manifest.images)} images, {len(manifest.pairs)} captions; {len(skipped)} skipped"
        if skipped:
            text += ": " + ", ".join(str(path) for path in skipped[:SHOWN_SKIPPED])
            text += f", and {len(skipped) - SHOWN_SKIPPED} more" if len(skipped) > SHOWN_SKIPPED else ""
        if manifest.faults:
            text += f"; {len(manifest.faults)} faulty manifest entries left out: {manifest.faults[0]}"
            text += ", …" if len(manifest.faults) > 1 else ""
        return text
