"""Frozen features on disk, so that a picture goes through the image encoder once and never again.

The image encoder of BLIP-2 is frozen in both stages, yet costs most of a step. Features are kept as
safetensors shards in a folder named after what decides them (`FrozenVisionEncoder.fingerprint()` and the
dtype), one tensor a picture under the picture's sha256. A shard's file name is the sha256 of its bytes, so a
damaged one is known by its name, thrown away, and its pictures are encoded again.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blip2_kernels.checks import check_folder, check_function, check_int, check_tensor, describe

from .atomic import replaced_file
from .images import UnfitPixelsError, open_image

if TYPE_CHECKING:
    from .vision import FrozenVisionEncoder

__all__ = ["EncodingReport", "FeatureCache", "SkippedImage", "image_sha256"]

CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ENCODERS_FOLDER = re.compile("[0-9a-f]{32}-(float16|bfloat16|float32)")
"""Names of the folders in a cache's directory: an encoder's fingerprint and a dtype."""


def image_sha256(image: Any) -> str:
    """Name a picture by its content.

    Args:
        image: a path or the bytes of an image file (the file's bytes are hashed), a PIL image (mode, size and
            pixels) or a tensor (dtype, shape and values).

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
        TypeError: something else.
    """
    if isinstance(image, str | Path):
        with open(image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, Tensor):
        head, body = f"tensor {image.dtype} {list(image.shape)}", image.detach().cpu().contiguous()
        digest = hashlib.sha256(head.encode())
        digest.update(body.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()
    if hasattr(image, "tobytes") and hasattr(image, "mode"):
        palette = image.getpalette() if image.mode == "P" else None
        head = f"image {image.mode} {image.size} {palette} {image.info.get('transparency')}"
        return hashlib.sha256(head.encode() + image.tobytes()).hexdigest()
    raise TypeError(f"image: expected a path, bytes, a PIL image or a tensor, got {describe(image)}")


@dataclass(frozen=True)
class SkippedImage:
    """A picture that could not be encoded: its place among those given, its name, and why."""

    index: int
    name: str
    reason: str


@dataclass
class EncodingReport:
    """What became of the pictures given to a `FeatureCache`.

    Attributes:
        hashes: one a picture, in the order given; None where it was skipped.
        encoded: distinct pictures that went through the encoder.
        reused: pictures whose features were there already (on disk, or from an equal picture before).
        skipped: those that could not be decoded or encoded.
        damaged: names of cache files that were thrown away because their content had changed.
    """

    hashes: list[str | None] = field(default_factory=list)
    encoded: int = 0
    reused: int = 0
    skipped: list[SkippedImage] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def kept(self) -> list[int]:
        """Indices of the pictures that were not skipped."""
        return [index for index, key in enumerate(self.hashes) if key is not None]

    def __str__(self) -> str:
        text = f"{self.encoded} encoded, {self.reused} reused, {len(self.skipped)} skipped"
        text += "".join(f"\n  skipped {image.name}: {image.reason}" for image in self.skipped)
        return text + "".join(f"\n  damaged cache file {name} thrown away" for name in self.damaged)


class FeatureCache:
    """Features of a frozen encoder, on disk.

    Several processes may share a directory: files appear whole or not at all, and are never changed.

    Args:
        directory: where the cache lives; made if it does not exist.
        encoder: whose features. Its preprocessing prepares the pictures; without one, only floating tensors
            [channels, height, width] are taken, and as they are.
        dtype: how features are stored, float16 (default), bfloat16 or float32. Pictures with features beyond
            its range are skipped, with that reason.
        shard_size: pictures a file.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        directory: str | Path,
        encoder: "FrozenVisionEncoder",
        *,
        dtype: torch.dtype = torch.float16,
        shard_size: int = 512,
    ) -> None:
        from .vision import FrozenVisionEncoder  # vision.py offers this class too, and so imports this file

        self.root = check_folder("directory", directory, writable=False)
        if not isinstance(encoder, FrozenVisionEncoder):
            raise TypeError(f"encoder: expected a FrozenVisionEncoder, got {describe(encoder)}")
        if dtype not in CACHE_DTYPES:
            raise TypeError(f"dtype: expected float16, bfloat16 or float32, got {dtype!r}")
        self.encoder = encoder
        self.dtype = dtype
        self.shard_size = check_int("shard_size", shard_size, 1)
        if ENCODERS_FOLDER.fullmatch(self.root.absolute().name):
            raise ValueError(
                f"directory: expected the folder that holds those of all encoders, {self.root.parent}, got "
                f"that of one of them, {self.root.name}; this encoder's is {self.directory.name}"
            )
        self._open_for: str | None = None
        self._shards: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self._damaged: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind: a data loader's worker opens its own.
        return {**self.__dict__, "_files": {}}

    @property
    def directory(self) -> Path:
        """Folder of the shards of this encoder, as its weights are now."""
        kind = str(self.dtype).removeprefix("torch.")
        return self.root / f"{self.encoder.fingerprint()[:32]}-{kind}"

    def __len__(self) -> int:
        self._open()
        return len(self._shards)

    def __contains__(self, key: object) -> bool:
        """Whether the features of the picture with this sha256 are there."""
        self._open()
        return key in self._shards

    def prepare(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 32,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> EncodingReport:
        """See that the features of all pictures are on disk; encode those that are not.

        Holds no more than a batch of pictures and a shard of features in memory. What was encoded before an
        interruption is kept.

        Args:
            images: paths, bytes of image files, PIL images or tensors; a list, or anything to iterate over.
            batch_size: pictures a forward pass.
            progress: called as `progress(done, total)` after each picture; total is None if unknown.

        Returns:
            What was encoded, reused and skipped. A picture that cannot be decoded never raises.

        A tensor that the encoder does not take (its channels, its size) counts as one that cannot be decoded.

        Raises:
            TypeError: an entry that is no picture at all, or another argument of the wrong kind.
            OSError: the cache cannot be written. What is there stays as it is.
        """
        check_int("batch_size", batch_size, 1)
        check_function("progress", progress)
        if isinstance(images, str | bytes | Path | Tensor) or not isinstance(images, Iterable):
            raise TypeError(f"images: expected a list of pictures, got {describe(images)}")
        self._open()
        report, self._damaged = EncodingReport(damaged=self._damaged), []
        total = len(images) if isinstance(images, Sized) else None
        batch: dict[str, tuple[Tensor, list[int], str]] = {}
        shard: dict[str, Tensor] = {}
        shape = None
        try:
            for index, image in enumerate(images):
                name = str(image) if isinstance(image, str | Path) else f"image {index}"
                report.hashes.append(None)
                try:
                    key = image_sha256(image)
                    if key in self._shards or key in shard:
                        report.hashes[index] = key
                        report.reused += 1
                    elif key in batch:
                        batch[key][1].append(index)
                    else:
                        pixels = self._pixels(image)
                        shape = shape or pixels.shape
                        check_tensor(name, pixels, shape)
                        batch[key] = (pixels, [index], name)
                except (OSError, ValueError) as error:
                    report.skipped.append(SkippedImage(index, name, str(error)))
                if len(batch) >= batch_size:
                    self._encode(batch, shard, report)
                if len(shard) >= self.shard_size:
                    self._write(shard)
                if progress is not None:
                    progress(index + 1, total)
            self._encode(batch, shard, report)
        finally:
            self._write(shard)
        report.skipped.sort(key=lambda image: image.index)
        return report

    def encode(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 32,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> tuple[Tensor, EncodingReport]:
        """Features of pictures, encoded only if they are not on disk; arguments as for `prepare`.

        Returns:
            (features [kept, tokens, width] in the cache's dtype on the CPU, report): one row a picture of
            `report.kept`, in order.
        """
        report = self.prepare(images, batch_size=batch_size, progress=progress)
        return self.load([key for key in report.hashes if key is not None]), report

    def load(self, hashes: Sequence[str]) -> Tensor:
        """Features of pictures by their sha256.

        Args:
            hashes: as `image_sha256` or `EncodingReport.hashes` give them; repeats are fine.

        Cheap enough to be called for each sample of a data set: shards stay memory-mapped, and whether the
        encoder's weights have changed is looked at by `prepare` and `encode`, not here.

        Returns:
            [len(hashes), tokens, width] in the cache's dtype, on the CPU; [0, 0, 0] for none.

        Raises:
            TypeError: no list of sha256.
            KeyError: not in the cache; all that are missing are counted, the first is named, and where the
                directory holds features of other encoders, these are.
            OSError: a file of the cache was taken away or damaged since it was opened.
        """
        if isinstance(hashes, str) or not isinstance(hashes, Sequence):
            raise TypeError(f"hashes: expected a list of sha256, got {describe(hashes)}")
        if self._open_for is None:
            self._open()
        missing = [key for key in hashes if key not in self._shards]
        if missing:
            raise KeyError(
                f"hashes: expected pictures in the cache, got {len(missing)} others, such as {missing[0]}"
                f"{self._of_others()}"
            )
        places: dict[Path, list[int]] = {}
        for place, key in enumerate(hashes):
            places.setdefault(self._shards[key], []).append(place)
        features = torch.empty(0, 0, 0, dtype=self.dtype)
        for path, rows in places.items():
            for row in rows:
                tensor = self._read(path, hashes[row])
                if not features.numel():
                    features = torch.empty(len(hashes), *tensor.shape, dtype=self.dtype)
                features[row] = tensor
        return features

    def _read(self, path: Path, key: str) -> Tensor:
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            return self._files[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"feature cache: {path} was taken away or damaged since it was opened ({error}); a new "
                "FeatureCache encodes its pictures again"
            ) from error

    def _of_others(self) -> str:
        """Which other encoders the directory holds features of: where features are missing, likely the
        cause."""
        own = self.directory
        others = [path.name for path in sorted(self.root.iterdir())] if self.root.is_dir() else []
        others = [name for name in others if ENCODERS_FOLDER.fullmatch(name) and name != own.name]
        if not others:
            return ""
        return (
            f"; {self.root} holds features of other encoders or dtypes, {', '.join(others)}, and this one's, "
            f"{own.name}, are not theirs: give the encoder that made them, or encode again with prepare()"
        )

    def _pixels(self, image: Any) -> Tensor:
        if isinstance(image, str | Path | bytes):
            image = open_image(image)
        if self.encoder.preprocessing is None and isinstance(image, Tensor) and image.is_floating_point():
            check_tensor("image", image, ["channels", "height", "width"])
            self.encoder.check_pixels("image", image[None])
            return image
        return self.encoder.preprocess(image)

    def _encode(
        self,
        batch: dict[str, tuple[Tensor, list[int], str]],
        shard: dict[str, Tensor],
        report: EncodingReport,
    ) -> None:
        """Encode a batch into the open shard, and empty it."""
        if not batch:
            return
        entries = list(batch.items())
        batch.clear()
        device = next(self.encoder.module.parameters(), torch.empty(0)).device
        pixels = torch.stack([pixels for _, (pixels, _, _) in entries]).to(device)
        try:
            features = self.encoder(pixels).to(self.dtype).cpu()
        except UnfitPixelsError as error:  # all of a batch have one shape
            for _, (_, places, name) in entries:
                report.skipped += [SkippedImage(place, name, str(error)) for place in places]
            return
        for (key, (_, places, name)), tensor in zip(entries, features, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                reason = f"features are not finite in {str(self.dtype).removeprefix('torch.')}"
                report.skipped += [SkippedImage(place, name, reason) for place in places]
                continue
            # A copy: a slice of the batch would keep the whole batch in memory.
            shard[key] = tensor.clone(memory_format=torch.contiguous_format)
            report.encoded += 1
            report.reused += len(places) - 1
            for place in places:
                report.hashes[place] = key

    def _open(self) -> None:
        """Read which pictures there are, once for the encoder's present weights; throw damaged files away."""
        directory = self.directory
        if self._open_for == str(directory):
            return
        self._shards, self._files = {}, {}
        for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else []:
            with open(path, "rb") as file:
                intact = hashlib.file_digest(file, "sha256").hexdigest() == path.stem
            if not intact:
                self._damaged.append(path.name)
                with contextlib.suppress(OSError):  # a cache that may only be read: passed over
                    path.unlink()
                continue
            with safe_open(path, framework="pt") as file:
                self._shards.update(dict.fromkeys(file.keys(), path))
        self._open_for = str(directory)

    def _write(self, shard: dict[str, Tensor]) -> None:
        """Write a shard, whole or not at all, and empty it."""
        if not shard:
            return
        content = save(shard)
        path = self.directory / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        with replaced_file(path, shared=True) as partial:
            partial.write_bytes(content)
        self._shards.update(dict.fromkeys(shard, path))
        shard.clear()
