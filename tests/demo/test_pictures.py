"""The small pictures beside captions.md: there whole, or not at all."""

import pytest
from PIL import Image

from blip2_kernels.model.demo import pipeline


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "draw", lambda scene: Image.new("RGB", (16, 16), scene))
    assert pipeline.save_pictures(["red", "blue"], tmp_path, size=8) == ["00.png", "01.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.png", "01.png"]
    with Image.open(tmp_path / "01.png") as image:
        assert image.size == (8, 8) and image.convert("RGB").getpixel((3, 3)) == (0, 0, 255)
    before = (tmp_path / "00.png").read_bytes()
    save = Image.Image.save

    def cut_short(image, file, *arguments, **options):
        save(image, file, *arguments, **options)
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(OSError, match="no space left"):
        pipeline.save_pictures(["green", "green"], tmp_path, size=8)
    assert (tmp_path / "00.png").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.png", "01.png"]
