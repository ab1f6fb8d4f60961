"""Picture files whose decoder stumbles over something other than an OSError."""

import io

import pytest
from PIL import Image, features


def broken_dds() -> bytes:
    """Announces a pixel format that nobody knows: Pillow raises NotImplementedError."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "DDS")
    data = bytearray(buffer.getvalue())
    data[80:84] = bytes(4)
    return bytes(data)


def broken_avif() -> bytes:
    """A sound header before noise: the decoder raises RuntimeError."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(buffer, "AVIF")
    return buffer.getvalue()[:-30] + b"\xff" * 30


BROKEN = pytest.mark.parametrize(
    ("broken", "suffix", "error"),
    [(broken_dds, "dds", NotImplementedError), (broken_avif, "avif", RuntimeError)],
    ids=["dds", "avif"],
)
