"""The paper's two ways to a square training picture (Ramesh et al. 2021, listings 1 and 2).

The listings are for 256 pixels, where pictures are first reduced to 288 = 9/8 or 384 = 3/2 of that; for other sizes
these bounds are rounded down. Numbers are drawn first (`draw_dvae`, `draw_transformer`: integers only) and then applied
(`apply_crop`: no chance in it), so each can be checked by itself.

The listings fail for pictures whose short side is below the size of the square. Here these are enlarged to it first,
bicubic, and then take the same way: only the position of the crop, and the flip, are left to chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

Augmentation = Literal["none", "dvae", "transformer"]
_Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What is drawn for one picture: a square of it, the side that is resized to, and a square of that."""

    left: int  # of the largest square that fits into the picture, enlarged if it is small (see `enlarged_size`)
    top: int
    resized_side: int  # from image_size to the side of that square
    inner_left: int  # of the image_size x image_size pixels that are kept of the resized square
    inner_top: int
    flip: bool  # left becomes right


def sample_rng(seed: int, epoch: int, key: int | str) -> np.random.Generator:
    """Randomness of one sample in one epoch: the same for any number of workers, any order, and after resuming.

    `key` must tell apart all samples of a data set: keys of tar members may collide between shards, the number of a
    sample in its `ShardIndex` does not, so that is what `PairDataset` gives.
    """
    digest = hashlib.sha256(f"{seed}|{epoch}|{key}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def enlarged_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Width and height of a picture after its short side is enlarged to `image_size`, if it is below that."""
    short = min(width, height)
    if short >= image_size:
        return width, height
    # The short side's is exact: short * image_size / short.
    return round(width * image_size / short), round(height * image_size / short)


def draw_dvae(rng: np.random.Generator, width: int, height: int, image_size: int) -> Crop:
    """Listing 1, for the dVAE: any square, reduced to between 9/8 and 3/2 of the size, any crop, half are flipped.

    `width` and `height` are at least `image_size`. A square smaller than these bounds keeps its size.
    """
    side = min(width, height)
    left, top = _integer(rng, 0, width - side), _integer(rng, 0, height - side)
    resized_side = _integer(rng, min(side, 9 * image_size // 8), min(side, 3 * image_size // 2))
    slack = resized_side - image_size
    return Crop(
        left=left,
        top=top,
        resized_side=resized_side,
        inner_left=_integer(rng, 0, slack),
        inner_top=_integer(rng, 0, slack),
        flip=bool(_integer(rng, 0, 1)),
    )


def draw_transformer(rng: np.random.Generator, width: int, height: int, image_size: int) -> Crop:
    """Listing 2, for the transformer: a square near the centre, reduced to at most 9/8 of the size, any crop.

    Never flipped: captions say left and right, and pictures may show text. `width` and `height` are at least
    `image_size`.
    """
    side = min(width, height)
    left, top = _near_centre(rng, width - side), _near_centre(rng, height - side)
    resized_side = _integer(rng, image_size, min(side, 9 * image_size // 8))
    slack = resized_side - image_size
    inner_left, inner_top = _integer(rng, 0, slack), _integer(rng, 0, slack)
    return Crop(left=left, top=top, resized_side=resized_side, inner_left=inner_left, inner_top=inner_top, flip=False)


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """One of low, ..., high."""
    return int(rng.integers(low, high, endpoint=True))


def _near_centre(rng: np.random.Generator, slack: int) -> int:
    """An offset between 3/8 and 5/8 of `slack`, exactly as the listing rounds them."""
    first = 3 * slack // 8
    return _integer(rng, first, max(first + 1, 5 * slack // 8) - 1)


_DRAW: dict[str, Callable[[np.random.Generator, int, int, int], Crop]] = {
    "dvae": draw_dvae,
    "transformer": draw_transformer,
}


def augment(
    pixels: UInt8[Tensor, "3 h w"],
    augmentation: Augmentation,
    *,
    image_size: int,
    seed: int,
    epoch: int,
    key: int | str,
) -> UInt8[Tensor, "3 s s"]:
    """The square that a picture gives in this epoch: a function of the arguments alone, see `sample_rng`."""
    _, height, width = pixels.shape
    rng = sample_rng(seed, epoch, key)
    crop = _DRAW[augmentation](rng, *enlarged_size(width, height, image_size), image_size)
    return apply_crop(pixels, crop, image_size)


def apply_crop(pixels: UInt8[Tensor, "3 h w"], crop: Crop, image_size: int) -> UInt8[Tensor, "3 s s"]:
    """The picture cropped, resized and cropped again as `crop` says; reducing is `area_resize`."""
    _, height, width = pixels.shape
    picture = pixels.permute(1, 2, 0).numpy()
    if min(width, height) < image_size:
        square = _enlarged_square(picture, crop, image_size)
    else:
        side = min(width, height)
        square = picture[crop.top : crop.top + side, crop.left : crop.left + side]
    rows = range(crop.inner_top, crop.inner_top + image_size)
    columns = range(crop.inner_left, crop.inner_left + image_size)
    kept = area_resize(square, crop.resized_side, rows, columns)
    if crop.flip:
        kept = kept[:, ::-1]
    return torch.from_numpy(kept.transpose(2, 0, 1).copy())


def _enlarged_square(picture: _Pixels, crop: Crop, image_size: int) -> _Pixels:
    """The crop's square of a small picture after enlarging it; the rest, which may be huge, is never made."""
    height, width = picture.shape[:2]
    new_width, new_height = enlarged_size(width, height, image_size)
    edges = (crop.left, crop.top, crop.left + image_size, crop.top + image_size)
    sizes = ((width, new_width), (height, new_height)) * 2
    box = tuple(edge * old / new for edge, (old, new) in zip(edges, sizes, strict=True))
    square = Image.fromarray(picture).resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square)


def area_resize(picture: _Pixels, side: int, rows: range, columns: range) -> UInt8[np.ndarray, "h2 w2 3"]:
    """These rows and columns of the picture resized to side x side, rounded half to even.

    TensorFlow 1's `resize_images(AREA, align_corners=True)`: new pixel i averages the stretch from i to i + 1 times
    (n - 1) / (side - 1) of the n old ones, each counted by the part of it that is inside; for the last new pixel that
    stretch is beyond the picture, where its last pixel is repeated. To reduce only: n >= `side`. TensorFlow computes
    positions in float32; here they are exact, so one value in a thousand is rounded to the other side.
    """
    height, width = picture.shape[:2]
    # Averages of numbers in [0, 255]: the clipping in the listings changes nothing.
    reduced = _average(picture, *_area_weights(height, side, rows), axis=0)
    return np.rint(_average(reduced, *_area_weights(width, side, columns), axis=1)).astype(np.uint8)


def _area_weights(old_side: int, side: int, wanted: range) -> tuple[np.ndarray, np.ndarray]:
    """For each wanted new pixel the old ones it averages, int64 (n, k), and their weights, float32 (n, k).

    In whole numbers: positions are multiples of 1 / parts of an old pixel, and a new one is `length` of them long.
    """
    length, parts = (old_side - 1, side - 1) if side > 1 else (old_side, 1)
    if length == 0:  # one pixel stays one
        length = parts = 1
    start = np.arange(wanted.start, wanted.stop, dtype=np.int64)[:, None] * length
    first = start // parts
    n_old = int((-(-(start + length) // parts) - first).max(initial=1))
    old = first + np.arange(n_old)
    inside = np.minimum(start + length, (old + 1) * parts) - np.maximum(start, old * parts)
    weights = np.maximum(inside, 0) / length
    return np.minimum(old, old_side - 1), weights.astype(np.float32)


def _average(picture: np.ndarray, old: np.ndarray, weights: np.ndarray, *, axis: int) -> np.ndarray:
    """Weighted sums along one axis, float32; a few old pixels make a new one, so this loops over these."""
    shape = [1, 1, 1]
    shape[axis] = len(old)
    total = np.take(picture, old[:, 0], axis) * weights[:, 0].reshape(shape)
    for tap in range(1, old.shape[1]):
        total += np.take(picture, old[:, tap], axis) * weights[:, tap].reshape(shape)
    return total
