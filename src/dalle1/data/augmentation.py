"""The paper's two ways to a square training picture (Ramesh et al. 2021, listings 1 and 2).

The listings are for 256 pixels, where pictures are first reduced to 288 = 9/8 or 384 = 3/2 of that; for other sizes
these bounds are rounded down. Numbers are drawn first (`draw_dvae`, `draw_transformer`: integers only) and then applied
(`apply_crop`: no chance in it), so each can be checked by itself.

The listings fail for pictures whose short side is below the size of the square. Here these are enlarged to it first,
bicubic, and then take the same way: only the position of the crop, and the flip, are left to chance.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from scipy.sparse._sparsetools import csr_matvecs
from torch import Tensor

from dalle1.data.jpeg import decode_jpeg, eighths_needed
from dalle1.data.transforms import PictureHeader, decode_image, read_header

Augmentation = Literal["none", "dvae", "transformer"]
_Pixels = UInt8[np.ndarray, "h w 3"]
_Planes = UInt8[np.ndarray, "3 h w"]
_AT_ONCE = 1 << 20  # numbers of a picture that are float32 at once: all of a usual one, never 100 megapixels
_TILE = 64  # rows that are transposed at once: so many stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What is drawn for one picture: a square of it, the side that is resized to, and a square of that."""

    left: int  # of the largest square that fits into the picture, enlarged if it is small (see `enlarged_size`)
    top: int
    resized_side: int  # from image_size to the side of that square
    inner_left: int  # of the image_size x image_size pixels that are kept of the resized square
    inner_top: int
    flip: bool  # left becomes right


def sample_rng(seed: int, epoch: int, key: int | str) -> Random:
    """Randomness of one sample in one epoch: the same for any number of workers, any order, and after resuming.

    `key` must tell apart all samples of a data set: keys of tar members may collide between shards, the number of a
    sample in its `ShardIndex` does not, so that is what `PairDataset` gives.
    """
    # Seeded by a hash of the text, in a third of the time of NumPy's.
    return Random(f"{seed}|{epoch}|{key}")


def enlarged_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Width and height of a picture after its short side is enlarged to `image_size`, if it is below that."""
    short = min(width, height)
    if short >= image_size:
        return width, height
    # The short side's is exact: short * image_size / short.
    return round(width * image_size / short), round(height * image_size / short)


def draw_dvae(rng: Random, width: int, height: int, image_size: int) -> Crop:
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


def draw_transformer(rng: Random, width: int, height: int, image_size: int) -> Crop:
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


def _integer(rng: Random, low: int, high: int) -> int:
    """One of low, ..., high; of all that Python draws it promises for `random` alone to stay what it is."""
    return low + int(rng.random() * (high - low + 1))


def _near_centre(rng: Random, slack: int) -> int:
    """An offset between 3/8 and 5/8 of `slack`, exactly as the listing rounds them."""
    first = 3 * slack // 8
    return _integer(rng, first, max(first + 1, 5 * slack // 8) - 1)


_DRAW: dict[str, Callable[[Random, int, int, int], Crop]] = {
    "dvae": draw_dvae,
    "transformer": draw_transformer,
}


def augment_file(
    data: bytes,
    augmentation: Augmentation,
    *,
    image_size: int,
    seed: int,
    epoch: int,
    key: int | str,
    background: str = "white",
) -> UInt8[Tensor, "3 s s"]:
    """The square that a picture file gives in this epoch: a function of the arguments alone, see `sample_rng`.

    Bit for bit `apply_crop` of the whole picture, except for JPEGs that are reduced to half of their size or less: they
    are decoded at a half or a quarter of it, which keeps a little more contrast; the rest of the way is `area_resize`.

    Raises: ValueError as `decode_image`.
    """
    return augment_file_epochs(
        data, augmentation, image_size=image_size, seed=seed, epochs=[epoch], key=key, background=background
    )[0]


def augment_file_epochs(
    data: bytes,
    augmentation: Augmentation,
    *,
    image_size: int,
    seed: int,
    epochs: Sequence[int],
    key: int | str,
    background: str = "white",
) -> UInt8[Tensor, "k 3 s s"]:
    """What `augment_file` gives in each of these epochs, the picture decoded once for each size that they need.

    Raises: ValueError as `decode_image`.
    """
    header = read_header(data)
    size = (header.width, header.height)
    decoded: dict[int, tuple[_Pixels, int]] = {}
    squares = np.empty((len(epochs), 3, image_size, image_size), np.uint8)
    for square, epoch in zip(squares, epochs, strict=True):
        rng = sample_rng(seed, epoch, key)
        crop = _DRAW[augmentation](rng, *enlarged_size(*size, image_size), image_size)
        wanted = eighths_needed(*size, crop.resized_side) if header.is_plain_jpeg else 8
        if wanted not in decoded:
            decoded[wanted] = _decode(data, header, wanted, background)
        picture, eighths = decoded[wanted]
        _cut_square(picture, size, eighths, crop, out=square)
    return torch.from_numpy(squares)


def _decode(data: bytes, header: PictureHeader, eighths: int, background: str) -> tuple[_Pixels, int]:
    """The picture, and at how many eighths of its size: these, or the whole if that cannot be."""
    if header.is_plain_jpeg:
        pixels = decode_jpeg(data, header.width, header.height, eighths)
        if pixels is not None:
            return pixels, eighths
    # Also for damaged JPEGs: what is said of them, and which are good enough, is Pillow's word.
    return np.asarray(decode_image(data, background)), 8


def apply_crop(pixels: UInt8[Tensor, "3 h w"], crop: Crop, image_size: int) -> UInt8[Tensor, "3 s s"]:
    """The picture cropped, resized and cropped again as `crop` says; reducing is `area_resize`."""
    _, height, width = pixels.shape
    square = np.empty((3, image_size, image_size), np.uint8)
    _cut_square(pixels.permute(1, 2, 0).numpy(), (width, height), 8, crop, out=square)
    return torch.from_numpy(square)


def _cut_square(picture: _Pixels, size: tuple[int, int], eighths: int, crop: Crop, *, out: _Planes) -> None:
    """Fill `out` with what `crop` says of a picture of `size` (width, height), given at `eighths` / 8 of that."""
    image_size = out.shape[-1]
    side, left, top = min(size), crop.left, crop.top
    if side < image_size:
        assert eighths == 8, "small pictures are decoded as they are"
        picture = _enlarged_square(picture, crop, image_size)
        side, left, top = image_size, 0, 0
    rows = range(crop.inner_top, crop.inner_top + image_size)
    columns = range(crop.inner_left, crop.inner_left + image_size)
    _average(
        picture,
        _stretches(side, crop.resized_side, rows, start=top, eighths=eighths),
        _stretches(side, crop.resized_side, columns, start=left, eighths=eighths),
        flip=crop.flip,
        out=out,
    )


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
    out = np.empty((3, len(rows), len(columns)), np.uint8)
    _average(picture, _stretches(height, side, rows), _stretches(width, side, columns), flip=False, out=out)
    return out.transpose(1, 2, 0)


class _Stretches(NamedTuple):
    """What some new pixels average along one axis: a sparse matrix by rows, one for each new pixel."""

    first: int  # of the given pixels that any of them needs
    n_given: int  # from `first` to the last that any needs
    ends: np.ndarray  # int32 (new pixels + 1,), where in the other two a new pixel's begin; the last one's end
    given: np.ndarray  # int32, counted from `first`
    weights: np.ndarray  # float32

    def average(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Fill `out`, float32 (new pixels, n), with averages of `numbers`, float32 (n_given, n)."""
        out.fill(0)
        # What `csr_array @ numbers` calls; its checks and new memory would be a twentieth of the time for a picture.
        csr_matvecs(
            len(out),
            self.n_given,
            out[0].size,
            self.ends,
            self.given,
            self.weights,
            numbers.reshape(-1),
            out.reshape(-1),
        )


def _stretches(old_side: int, side: int, wanted: range, *, start: int = 0, eighths: int = 8) -> _Stretches:
    """For new pixels `wanted` of `side`, made of `old_side` pixels from `start` of a picture given at eighths / 8."""
    whole, phase = divmod(start * eighths, 8)
    ends, given, weights = _area_weights(old_side, side, phase, eighths)
    ends = ends[wanted.start : wanted.stop + 1]
    begin, end = int(ends[0]), int(ends[-1])
    first, last = int(given[begin]), int(given[end - 1])
    return _Stretches(whole + first, last - first + 1, ends - begin, given[begin:end] - first, weights[begin:end])


# Pictures of one size, which many data sets have, need at most 97 of these at 256 pixels, some 10 kB each.
@lru_cache(maxsize=256)
def _area_weights(old_side: int, side: int, phase: int, eighths: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For all new pixels what `_Stretches` has for some; the first one begins `phase` / 8 inside given pixel 0.

    In whole numbers: positions are multiples of 1 / parts of a given pixel, and a new one is `length` of them long.
    """
    length, parts = (old_side - 1, side - 1) if side > 1 else (old_side, 1)
    if length == 0:  # one pixel stays one
        length = parts = 1
    length, parts, start = length * eighths, parts * 8, phase * parts
    starts = start + np.arange(side, dtype=np.int64)[:, None] * length
    first = starts // parts
    n_given = int((-(-(starts + length) // parts) - first).max())
    given = first + np.arange(n_given)
    inside = np.minimum(starts + length, (given + 1) * parts) - np.maximum(starts, given * parts)
    is_inside = inside > 0
    ends = np.concatenate(([0], np.cumsum(is_inside.sum(axis=1)))).astype(np.int32)
    last = (phase + (old_side - 1) * eighths) // 8
    weights = (inside[is_inside] / length).astype(np.float32)
    return ends, np.minimum(given, last)[is_inside].astype(np.int32), weights


class _Memory(threading.local):
    """Arrays that each picture fills anew: getting new memory from the system can take longer than the arithmetic."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, dtype: type[np.generic], *shape: int) -> np.ndarray:
        """The array of that name, with whatever is in it."""
        size = math.prod(shape)
        if name not in self._arrays or self._arrays[name].size < size:
            # From 4 MiB on NumPy asks for large pages, which save another twentieth of the time for a picture.
            self._arrays[name] = np.empty(max(size, _AT_ONCE), dtype)
        return self._arrays[name][:size].reshape(shape)


_MEMORY = _Memory()


def _average(picture: _Pixels, rows: _Stretches, columns: _Stretches, *, flip: bool, out: _Planes) -> None:
    """Fill `out` with averages over stretches of rows, then of columns, rounded half to even."""
    _, height, width = out.shape
    picture = picture[rows.first : rows.first + rows.n_given, columns.first : columns.first + columns.n_given]
    # To average columns these must be where rows were: (columns, 3, new rows).
    turned = _MEMORY.array("turned", np.float32, columns.n_given * 3, height)
    at_once = max(1, _AT_ONCE // (3 * rows.n_given))
    for first in range(0, columns.n_given, at_once):
        strip = picture[:, first : first + at_once]
        numbers = _MEMORY.array("numbers", np.float32, *strip.shape)
        numbers[:] = strip
        averages = _MEMORY.array("averages", np.float32, height, 3 * strip.shape[1])
        rows.average(numbers, averages)
        _transpose(averages, turned[3 * first : 3 * (first + at_once)])
    averages = _MEMORY.array("averages", np.float32, width, 3 * height)
    columns.average(turned, averages)
    pixels = _MEMORY.array("pixels", np.uint8, width, 3 * height)
    # Averages of numbers in [0, 255]: the clipping in the listings changes nothing.
    np.copyto(pixels, np.rint(averages, out=averages), casting="unsafe")
    _transpose(pixels[::-1] if flip else pixels, out.reshape(3 * height, width))


def _transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with `matrix` turned."""
    for first in range(0, len(matrix), _TILE):
        out[:, first : first + _TILE] = matrix[first : first + _TILE].T
