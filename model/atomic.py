"""Files and folders that are there whole or not at all: written beside their place, then renamed into it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends; an error leaves what was there.

    The block flushes its files to the disk itself (`write_tensors` and `write_bytes` do).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    partial = beside(path, "partial")
    if partial.exists():  # of a process that died while writing it
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        sync_directory(partial)
        swap(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends, flushed to the disk, unless `path` has come to be
    by then: several processes may make it at once, and what the first has made is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path, f"{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync_file(file)
        sync_directory(partial)
        try:
            os.rename(partial, path)
        except OSError:
            if not path.is_dir():
                raise
        sync_directory(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replaced_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """The name of a new file that takes the place of `path` when the block ends, flushed to the disk.

    With `shared` several processes may write it at once: each has a new file of its own, and the last one's
    stays. What a process that died left behind is then not written over by the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = beside(path, f"{secrets.token_hex(4)}.partial" if shared else "partial")
    try:
        yield partial
        _sync_file(partial)
        os.replace(partial, path)
        sync_directory(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def beside(path: Path, role: str) -> Path:
    """A hidden neighbour of `path`: on the same file system, so that a rename is atomic."""
    return path.with_name(f".{path.name}.{role}")


def swap(partial: Path, path: Path) -> None:
    """Put a complete directory in place of the one at `path`.

    A directory that is not empty cannot be replaced in one step everywhere. Between the two renames the old
    checkpoint is whole under its `previous` name, where readers find it.
    """
    previous = beside(path, "previous")
    if path.exists():
        os.rename(path, previous)
    try:
        os.rename(partial, path)
    except OSError:
        if previous.exists():
            os.rename(previous, path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def settle(path: Path) -> None:
    """Finish what a process that died inside `swap` left behind."""
    previous = beside(path, "previous")
    if previous.exists():
        if path.exists():
            shutil.rmtree(previous)
        else:
            os.rename(previous, path)


def write_tensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        safetensors.torch.save_file(state, path, metadata)
    except safetensors.SafetensorError as error:
        # A full disk arrives here as a library error with the operating system's text in it.
        raise OSError(f"{path.name}: cannot write: {error}") from error
    _sync_file(path)


def write_bytes(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make new names in a directory survive a power cut, where the system can open directories."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
