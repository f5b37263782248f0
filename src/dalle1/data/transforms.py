"""From a picture file to the square pixels that models see: decode, crop the centre, resize.

`pixels` are always uint8 in [0, 255], `image` is always float32 in [0, 1].
"""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_MEGAPIXELS = 100
# Damaged files make Pillow's readers raise more than OSError.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, struct.error)


def decode_image(data: bytes) -> Image.Image:
    """The picture in a JPEG, PNG or WebP file, as 8-bit RGB and turned upright as its EXIF tag says.

    Transparent parts become white. Colour profiles are ignored. Of an animation it is the first frame.

    Raises: ValueError if the file is damaged or of another format, or above 100 megapixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns at 89 megapixels; our own limit follows.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        megapixels = image.width * image.height / 1e6
        if megapixels > MAX_MEGAPIXELS:
            raise ValueError(f"it has {megapixels:.1f} megapixels, more than the {MAX_MEGAPIXELS} allowed")
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError("it is not a JPEG, PNG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than the {MAX_MEGAPIXELS} megapixels allowed") from error
    except _DECODE_ERRORS as error:
        raise ValueError(str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255; the upper 8 bits are the picture.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_and_resize(image: Image.Image, image_size: int) -> UInt8[Tensor, "3 s s"]:
    """The largest centred square of an RGB picture, resized to `image_size` pixels a side.

    Shrinking averages the area that each new pixel covers, as the paper does (Ramesh et al. 2021, app. A):
    no aliasing, no ringing at edges. Area averaging would enlarge into blocks, so that is bicubic.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    resample = Image.Resampling.BOX if side >= image_size else Image.Resampling.BICUBIC
    square = image.resize((image_size, image_size), resample, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def to_unit_interval(pixels: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Pixels in [0, 255] as float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255
