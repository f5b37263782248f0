"""JPEG files decoded at a fraction of their size: what a smaller picture would not show is not computed."""

from __future__ import annotations

import struct

import numpy as np
import simplejpeg
from jaxtyping import UInt8

_START, _SCAN = 0xFFD8, 0xFFDA
_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended and progressive
# JFIF, comment, and tables. Not the others: these may hold EXIF data, further pictures or another meaning of colours.
_PLAIN_PARTS = (0xFFE0, 0xFFFE, 0xFFDB, 0xFFC4, 0xFFDD)
# Sizes, in eighths of the whole, that have fast code: 5, 6 and 7 take longer than 8, and 1 is hardly faster than 2.
_EIGHTHS = (2, 4, 8)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a grey or colour JPEG that says no more of itself than that; None for all other files."""
    if data[:2] != _START.to_bytes(2, "big"):
        return None
    size, position = None, 2
    try:
        while True:
            marker, length = struct.unpack_from(">HH", data, position)
            if marker == _SCAN:
                return size
            if marker in _FRAMES and size is None:
                bits, height, width, n_planes = struct.unpack_from(">BHHB", data, position + 4)
                if bits != 8 or n_planes not in (1, 3) or not width or not height:
                    return None
                size = (width, height)
            elif marker not in _PLAIN_PARTS:
                return None
            position += 2 + length
    except struct.error:  # the file ends here
        return None


def eighths_needed(width: int, height: int, resized_side: int) -> int:
    """At how many eighths of its size to decode a picture of which a square of the short side becomes `resized_side`.

    2 or 4 if the short side then still has as many pixels, else 8.
    """
    short = min(width, height)
    if short < 8:  # several eighths give the same size, which is what `decode_jpeg` asks for
        return 8
    return next((eighths for eighths in _EIGHTHS if short * eighths >= 8 * resized_side), 8)


def decode_jpeg(data: bytes, width: int, height: int, eighths: int) -> UInt8[np.ndarray, "h w 3"] | None:
    """A grey or colour JPEG of `width` x `height` pixels as RGB, not turned, at `eighths` / 8 of its size.

    Pixel i of a row or column then covers what is from 8 i / eighths to 8 (i + 1) / eighths in that of the whole
    picture, and the last one may reach beyond its end. With 8 the pixels are Pillow's.

    None for any damage, even such as Pillow lives with.
    """
    scaled_width, scaled_height = -(-width * eighths // 8), -(-height * eighths // 8)
    try:
        pixels = simplejpeg.decode_jpeg(data, min_width=scaled_width, min_height=scaled_height)
    except (ValueError, RuntimeError, MemoryError):
        return None
    return pixels if pixels.shape == (scaled_height, scaled_width, 3) else None
