"""Which image goes with which captions: JSON lines, JSON, CSV, TSV, or a folder.

- JSON lines (`.jsonl`): one object a line, `{"image": "a.jpg", "caption": "a cat"}`; `caption` may be a list.
- JSON (`.json`): a list of such objects, as LAVIS's annotation files.
- CSV and TSV: a header line with the two columns, one caption a row.
- A folder: images at any depth, each beside a text file of the same name (`a.jpg`, `a.txt`), one caption a
line.

Images that appear more than once (by path, or by an `image_id` of their own) are one image with several
captions.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2_kernels.checks import check_bool, describe

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Pair:
    """One caption of one image; `image` counts distinct images of the manifest from 0."""

    image: int
    caption: str


@dataclass
class Manifest:
    """Images and captions, in the order of the file.

    Attributes:
        images: path of each distinct image.
        pairs: one entry a caption.
        faults: what was left out and why, with line numbers; empty unless `on_fault="skip"`.
    """

    images: list[Path] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def captions_of_images(self) -> list[list[str]]:
        """The captions of each image, in order."""
        captions: list[list[str]] = [[] for _ in self.images]
        for pair in self.pairs:
            captions[pair.image].append(pair.caption)
        return captions


def read_manifest(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    image_key: str = "image",
    caption_key: str = "caption",
    check_files: bool = True,
    on_fault: str = "raise",
) -> Manifest:
    """Reads a manifest.

    Args:
        path: `.jsonl`, `.json`, `.csv` or `.tsv` file, or a folder of images with `.txt` files.
        image_root: what image paths are relative to; default: the manifest's folder.
        image_key, caption_key: names of the fields or columns.
        check_files: looks whether every image is there (one `stat` an image).
        on_fault: `"raise"`, or `"skip"` to leave faulty entries out and list them in `faults`.

    Raises:
        TypeError: an argument of the wrong kind.
        FileNotFoundError: no such manifest.
        ValueError: malformed lines, missing fields, empty captions, missing files: how many there are, and
            the first few with their line numbers; or nothing usable at all.
    """
    for name, value in (("path", path), ("image_root", path if image_root is None else image_root)):
        if not isinstance(value, str | Path):
            raise TypeError(f"{name}: expected a path, got {describe(value)}")
    for name, value in (("image_key", image_key), ("caption_key", caption_key)):
        if not isinstance(value, str):
            raise TypeError(f"{name}: expected a str, got {describe(value)}")
    check_bool("check_files", check_files)
    path = Path(path)
    if on_fault not in ("raise", "skip"):
        raise ValueError(f"on_fault: expected 'raise' or 'skip', got {on_fault!r}")
    if not path.exists():
        raise FileNotFoundError(f"manifest: no such file or folder: {path}")
    root = Path(image_root) if image_root is not None else (path if path.is_dir() else path.parent)
    readers = {".jsonl": _json_lines, ".json": _json_list, ".csv": _table, ".tsv": _table}
    if path.is_dir():
        entries = _folder(path, image_key, caption_key)
    elif path.suffix.lower() in readers:
        entries = readers[path.suffix.lower()](path, image_key, caption_key)
    else:
        raise ValueError(f"manifest: expected {', '.join(readers)} or a folder, got {path.name!r}")

    manifest = Manifest()
    numbers: dict[str, int] = {}
    present: dict[Path, bool] = {}
    for place, entry in entries:
        try:
            if isinstance(entry, str):
                raise ValueError(entry)
            name, captions, key = _checked(entry, image_key, caption_key)
            file = root / name
            if check_files and file not in present:
                present[file] = file.is_file()
            if check_files and not present[file]:
                raise ValueError(f"no such image: {file}")
        except (ValueError, OSError) as error:  # a name too long for the disk is an OSError
            manifest.faults.append(f"{place}: {error}")
            continue
        number = numbers.setdefault(key if key is not None else str(file), len(manifest.images))
        if number == len(manifest.images):
            manifest.images.append(file)
        manifest.pairs += [Pair(number, caption) for caption in captions]
    if manifest.faults and on_fault == "raise":
        raise ValueError(_describe(path, manifest.faults))
    if not manifest.pairs:
        reason = f"; {_describe(path, manifest.faults)}" if manifest.faults else ""
        raise ValueError(f"manifest: expected at least one image with a caption in {path}{reason}")
    return manifest


def _describe(path: Path, faults: list[str]) -> str:
    shown = "; ".join(faults[:SHOWN_FAULTS])
    more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return (
        f"manifest {path}: {len(faults)} faulty {'entry' if len(faults) == 1 else 'entries'}: {shown}{more}"
    )


def _checked(entry: Any, image_key: str, caption_key: str) -> tuple[str, list[str], str | None]:
    """Image name, captions, and the image's own id if it has one."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {type(entry).__name__}")
    for key in (image_key, caption_key):
        if key not in entry or entry[key] is None:
            raise ValueError(
                f"expected a field {key!r}, got {sorted(str(k) for k in entry if k is not None)}"
            )
    name, captions = entry[image_key], entry[caption_key]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{image_key}: expected a path, got {name!r}")
    captions = captions if isinstance(captions, list) else [captions]
    if not captions or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"{caption_key}: expected a text or a list of texts, got {entry[caption_key]!r}")
    captions = [" ".join(caption.split()) for caption in captions]
    if not all(captions):
        raise ValueError(f"{caption_key}: expected a text, got an empty one")
    identity = entry.get("image_id")
    return name, captions, None if identity is None else f"id {identity!r}"


Entries = Iterator[tuple[str, Any]]  # (where it stands, the entry, or a text that says what is wrong)


def _json_lines(path: Path, image_key: str, caption_key: str) -> Entries:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            entry: Any
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                entry = f"not JSON: {error.msg} at column {error.colno}"
            except RecursionError:
                entry = "not JSON that can be read: nested too deep"
            yield f"line {number}", entry


def _json_list(path: Path, image_key: str, caption_key: str) -> Entries:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"manifest {path}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"manifest {path}: expected a list of objects, got {type(entries).__name__}")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, start=1))


def _table(path: Path, image_key: str, caption_key: str) -> Entries:
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
        reader = csv.DictReader(file, dialect=dialect)
        missing = [key for key in (image_key, caption_key) if key not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(
                f"manifest {path}: line 1: expected columns {image_key!r} and {caption_key!r}, "
                f"got {reader.fieldnames or []}"
            )
        rows = iter(reader)
        while True:
            try:
                row: Any = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                row = str(error)
            if isinstance(row, dict) and None in row:
                row = f"expected {len(reader.fieldnames or [])} columns, got {len(row) - 1 + len(row[None])}"
            yield f"line {reader.line_num}", row


def _folder(path: Path, image_key: str, caption_key: str) -> Entries:
    for image in sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()):
        name, text = str(image.relative_to(path)), image.with_suffix(".txt")
        if not text.is_file():
            yield name, f"no captions beside it ({text.name})"
            continue
        lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        captions = [line for line in lines if line.strip()]
        yield name, {image_key: name, caption_key: captions} if captions else f"{text.name} is empty"
