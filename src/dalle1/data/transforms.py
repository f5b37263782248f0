"""From a picture file to the pixels that models see: decode, crop the centre, resize.

`pixels` are always uint8 in [0, 255], `image` is always float32 in [0, 1].
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from dalle1.data.jpeg import plain_jpeg_size

MAX_MEGAPIXELS = 100
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# Of a PNG's parts these can say how it is turned, also after its pixels.
_PNG_TURNS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


class PictureHeader(NamedTuple):
    """What a picture file says of itself before its pixels."""

    width: int  # as it will be seen: after turning it upright
    height: int
    is_plain_jpeg: bool  # grey or RGB, a single picture and upright as it is


def parse_color(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour as Pillow knows it: a name such as `white`, or `#rrggbb`.

    Raises: ValueError for anything else, colours with an alpha value included.
    """
    try:
        color = ImageColor.getrgb(name)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"a colour must be a name such as 'white', or '#rrggbb', got {name!r}") from error
    if len(color) != 3:
        raise ValueError(f"a colour must be opaque, got {name!r}; leave out its alpha value")
    return color


def decode_image(data: bytes, background: str = "white", *, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """The picture in a JPEG, PNG or WebP file, as 8-bit RGB and turned upright as its EXIF tag says.

    Transparent parts show `background`, a colour as `parse_color` takes it. Colour profiles, and EXIF data that cannot
    be read, are ignored. 16-bit pictures keep their upper 8 bits. Of an animation it is the first picture.

    Raises: ValueError if the file is damaged or of another format, or above `max_megapixels`, which its head says: its
        pixels are not decoded then.
    """
    color = parse_color(background)
    with _errors_in_one_sentence(max_megapixels):
        image = _open(data, max_megapixels)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        return _to_rgb(image if turn is None else image.transpose(turn), color)


def read_header(data: bytes) -> PictureHeader:
    """Size and kind of a picture, without decoding it; of a PNG that may be turned, with.

    Raises: ValueError as `decode_image`, for what can be told without the pixels.
    """
    size = plain_jpeg_size(data)
    if size is not None:  # what most pictures are, in a tenth of Pillow's time
        _check_size(*size)
        return PictureHeader(*size, is_plain_jpeg=True)
    with _errors_in_one_sentence():
        image = _open(data)
        may_turn = image.format != "PNG" or any(name in data for name in _PNG_TURNS)
        orientation = _orientation(image) if may_turn else 1
        width, height = reversed(image.size) if orientation in _SIDEWAYS else image.size
        is_plain_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB") and orientation == 1
        return PictureHeader(width, height, is_plain_jpeg)


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height of the picture that `decode_image` would give.

    Raises: ValueError as `read_header`.
    """
    header = read_header(data)
    return header.width, header.height


@contextmanager
def _errors_in_one_sentence(max_megapixels: float = MAX_MEGAPIXELS) -> Iterator[None]:
    """Whatever Pillow raises, as a ValueError."""
    try:
        # Pillow warns of damage that it can live with, and at 89 megapixels; a data set may be full of either.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError as error:
        raise ValueError("it is not a JPEG, PNG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than the {max_megapixels:g} megapixels allowed") from error
    except MemoryError as error:
        raise ValueError("it needs more memory than there is") from error
    # Damaged files make Pillow's readers raise anything: OSError, SyntaxError, struct.error, zlib.error, KeyError, ...
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _open(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    if not data:
        raise ValueError("it is empty, not a JPEG, PNG or WebP file")
    image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    _check_size(image.width, image.height, max_megapixels)
    return image


def _check_size(width: int, height: int, max_megapixels: float = MAX_MEGAPIXELS) -> None:
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        raise ValueError(f"it has {megapixels:.1f} megapixels, more than the {max_megapixels:g} allowed")


def _orientation(image: Image.Image) -> int:
    """How the picture lies in the file, 1 to 8 as in EXIF; 1 is upright."""
    # Not ImageOps.exif_transpose: that fails where another EXIF entry is damaged.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in _UPRIGHT else 1
    except Exception:  # whatever the EXIF reader stumbles over, the picture itself is good
        return 1


def _to_rgb(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):
        image = _upper_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, color), image).convert("RGB")
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with an alpha channel if one level is transparent; Pillow would clip it at 255."""
    levels = np.asarray(image)
    grey = Image.fromarray((levels >> 8).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    opaque = levels != image.info["transparency"]
    return Image.merge("LA", (grey, Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))))


def crop_and_resize(image: Image.Image, image_size: int) -> UInt8[Tensor, "3 s s"]:
    """The largest centred square of an RGB picture, resized as `fit_picture` to `image_size` pixels a side."""
    return fit_picture(image, image_size, image_size)


def fit_picture(image: Image.Image, height: int, width: int) -> UInt8[Tensor, "3 {height} {width}"]:
    """The largest centred crop of an RGB picture with the aspect of `height` x `width` pixels, resized to that.

    The crop's sides are whole pixels, so its aspect can be off by less than one of them.

    Shrinking averages the area that each new pixel covers, as the paper does (Ramesh et al. 2021, app. A):
    no aliasing, no ringing at edges. Area averaging would enlarge into blocks, so that is bicubic.
    """
    box = crop_box(image.size, height, width)
    resample = Image.Resampling.BOX if box[3] - box[1] >= height else Image.Resampling.BICUBIC
    return to_pixels(image.resize((width, height), resample, box=box)).contiguous()


def crop_box(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the largest centred part with that aspect, of a picture of `size` (w, h)."""
    crop_width = min(size[0], max(1, size[1] * width // height))
    crop_height = min(size[1], max(1, size[0] * height // width))
    left, top = (size[0] - crop_width) // 2, (size[1] - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def to_pixels(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """An RGB picture of any size as a tensor, 3 bytes per pixel."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_unit_interval(pixels: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Pixels in [0, 255] as float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255
