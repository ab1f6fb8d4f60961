"""Files and folders that several processes may make at once: whole, and nothing else beside them."""

import os
from pathlib import Path

import pytest

from blip2_kernels.model.atomic import replaced_file, shared_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_writer_of_a_shared_file_has_its_own_and_the_last_stays(tmp_path):
    path = tmp_path / "deep" / "file"
    with replaced_file(path, shared=True) as first:
        first.write_text("first")
        with replaced_file(path, shared=True) as second:
            second.write_text("second")
        assert path.read_text() == "second" and first.read_text() == "first"
    assert path.read_text() == "first" and names(path.parent) == ["file"]


def test_the_first_folder_stays_and_the_others_are_thrown_away(tmp_path):
    path = tmp_path / "deep" / "folder"
    with shared_folder(path) as slow:
        (slow / "who").write_text("slow")
        with shared_folder(path) as fast:
            (fast / "who").write_text("fast")
        before = path.stat()
    assert (path / "who").read_text() == "fast" and path.stat() == before
    assert names(path.parent) == ["folder"]


def test_a_folder_whose_making_fails_leaves_no_trace(tmp_path):
    with pytest.raises(KeyboardInterrupt), shared_folder(tmp_path / "folder") as partial:
        (partial / "half").write_text("of it")
        raise KeyboardInterrupt
    assert not names(tmp_path)
    (tmp_path / "folder").write_text("a file in its way")
    with pytest.raises(OSError), shared_folder(tmp_path / "folder") as partial:
        (partial / "whole").write_text("all of it")
    assert names(tmp_path) == ["folder"]


def test_every_file_of_a_folder_is_flushed_before_it_is_there(tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def recording(handle):
        assert not (tmp_path / "folder" / "a").exists() or os.fstat(handle).st_ino == tmp_path.stat().st_ino
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording)
    with shared_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("a")
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("b")
    assert {(tmp_path / "folder" / name).stat().st_ino for name in ("a", "sub/b")} < flushed
