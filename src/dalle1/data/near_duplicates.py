"""Pictures that were shown before: perceptual hashes of 64 bits, and which of them are near an earlier one.

The hash is the usual one by the discrete cosine transform (pHash), and has the bits that the library ImageHash gives.
That would bring PyWavelets along, for another hash; ten lines do not need it. Half of the bits are ones, so that two
hashes differ in an even number of bits: the distances that matter are 0, 2, 4 and 6.

Measured on 300 photographs: no two of them differ in fewer than 14 bits. Copies as JPEG of quality 30, a third as large
or with less contrast differ in at most 4 bits from the original; so do 97 % of copies without 1 % of each border, 42 %
without 3 %, and 7 % with a white label on a fiftieth of the picture. A hash by differences (dHash) minds labels less,
but has other photographs at 9 bits, and five times as many pairs of drawings within 3.

Colours are not looked at, only where a picture is brighter and darker than on the whole. Photographs lose nothing by
that. Drawings do: "a red heart" and "a blue heart" may have one hash, and of 3,073 emoji half are within 4 bits
of another one. All pictures of one colour have the same hash (black ones differ from others in one bit), and so only
the first stays.

Measured on one core: a million random hashes take 0.3 s at distance 0, 3 s at 3 and 15 s at 6.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import scipy.fft
from jaxtyping import Bool, UInt64
from PIL import Image

from dalle1.data.transforms import MAX_MEGAPIXELS, decode_image

HASH_BITS = 64
# Beyond it, drawings that have nothing to do with each other come near, and the search takes minutes.
MAX_DISTANCE = 6

_SIDE = 32  # pixels a side of what is transformed; the 8 x 8 lowest frequencies make up the hash
_LOW = 8
# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but not below this: 99.7 % of hashes then differ in 2 bits at
# most from those of the whole picture, and one of 1.4 megapixels takes 3 ms instead of 16.
_LEAST_JPEG_SIDE = 128
_PAIRS_AT_ONCE = 1 << 22  # bounds the memory of a search
_FEW = 256  # hashes of which all pairs are compared

_Hashes = UInt64[np.ndarray, " n"]
_Mask = Bool[np.ndarray, " n"]


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that similar pictures mostly share, as a whole number >= 0; transparency is ignored."""
    return _hash(image, None)


def hash_file(data: bytes) -> int:
    """The perceptual hash of the picture in a JPEG, PNG or WebP file, turned upright as its EXIF tag says.

    Raises: ValueError if the file is damaged, of another format or too large, as `decode_image` does.
    """
    hashed = _hash_jpeg_fast(data)
    return perceptual_hash(decode_image(data)) if hashed is None else hashed


def near_duplicates(hashes: _Hashes, max_distance: int) -> _Mask:
    """Which hashes differ in at most `max_distance` bits from an earlier one that is no near-duplicate itself.

    So what is left differs in more than that, each from each; of a chain in which only neighbours are near, every
    second one stays. The result depends on nothing but the hashes and their order.

    Raises: TypeError if hashes are not uint64; ValueError if the distance is outside [0, 6].
    """
    if hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise TypeError(f"hashes must be uint64 in one dimension, got {hashes.dtype} in {hashes.ndim}")
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance must be in [0, {MAX_DISTANCE}] bits, got {max_distance}")
    # Of equal hashes the first decides for all: what is near a later one is near it too.
    first = np.sort(np.unique(hashes, return_index=True)[1])
    if max_distance > 0:
        distinct = hashes[first]
        # Most have no neighbour at all, and so no say in what becomes of the others.
        crowded = np.flatnonzero(_has_near(distinct, distinct, max_distance))
        stays = np.ones(len(first), dtype=bool)
        stays[crowded] = _stays(distinct[crowded], max_distance)
        first = first[stays]
    duplicate = np.ones(len(hashes), dtype=bool)
    duplicate[first] = False
    return duplicate


def _hash(image: Image.Image, box: tuple[float, float, float, float] | None) -> int:
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box=box)
    frequencies = scipy.fft.dctn(np.asarray(small, dtype=np.float64))[:_LOW, :_LOW]
    # Symmetric and plain pictures have frequencies that are 0 but for rounding, whose bits would be chance.
    frequencies = frequencies.round(3)
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _hash_jpeg_fast(data: bytes) -> int | None:
    """The hash of an upright grey or colour JPEG, decoded at a part of its size; None for all others, damaged ones too.

    Those are left to `decode_image`, which turns them or says what is wrong.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
            is_turned = image.getexif().get(0x0112, 1) != 1  # the tag of the orientation
            if is_turned or image.mode not in ("L", "RGB") or image.width * image.height > MAX_MEGAPIXELS * 1e6:
                return None
            drafted = image.draft("L", (_LEAST_JPEG_SIDE, _LEAST_JPEG_SIDE))
            # The sides are rounded up to whole pixels; the box is what the picture really fills.
            return _hash(image, None if drafted is None else drafted[1])
    except Exception:  # damaged files make Pillow's readers raise anything
        return None


def _stays(hashes: _Hashes, max_distance: int) -> _Mask:
    """Which of the distinct hashes are not near an earlier one that stays: the first half decides for the second."""
    if len(hashes) <= _FEW:
        near = np.bitwise_count(hashes[:, None] ^ hashes) <= max_distance
        stays = np.ones(len(hashes), dtype=bool)
        for i in range(len(hashes)):
            if stays[i]:
                stays[i + 1 :] &= ~near[i, i + 1 :]
        return stays
    half = len(hashes) // 2
    earlier = _stays(hashes[:half], max_distance)
    later = ~_has_near(hashes[half:], hashes[:half][earlier], max_distance)
    later[later] = _stays(hashes[half:][later], max_distance)
    return np.concatenate([earlier, later])


def _has_near(hashes: _Hashes, others: _Hashes, max_distance: int) -> _Mask:
    """Which hashes differ from one of the others in 1 to `max_distance` bits.

    Two hashes that differ in d bits agree in at least two of d + 2 bands of bits, whichever they are (Manku et al.
    2007): for each choice of two bands, only hashes that agree in both are compared.
    """
    found = np.zeros(len(hashes), dtype=bool)
    for mask in _band_pairs(max_distance):
        others = others[np.argsort(others & mask)]
        keys = others & mask
        remaining = np.flatnonzero(~found)
        remaining = remaining[np.argsort(hashes[remaining] & mask)]  # in order, a search stays in the cache
        wanted = hashes[remaining] & mask
        start, stop = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        for part in _parts(stop - start):
            found[remaining[part]] = _any_near(hashes[remaining[part]], others, start[part], stop[part], max_distance)
    return found


def _band_pairs(max_distance: int) -> Iterator[np.uint64]:
    """Masks of two bands of bits each, for every choice of two out of `max_distance` + 2 bands."""
    edges = np.linspace(0, HASH_BITS, max_distance + 3).round().astype(int).tolist()
    bands = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    for first, second in combinations(bands, 2):
        yield np.uint64(first | second)


def _parts(counts: np.ndarray) -> Iterator[slice]:
    """Slices whose counts add up to a bounded number, or hold one count above it."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, "right")))
        yield slice(start, stop)
        start = stop


def _any_near(hashes: _Hashes, others: _Hashes, start: np.ndarray, stop: np.ndarray, max_distance: int) -> _Mask:
    """Whether hash i differs from one of `others[start[i]:stop[i]]` in 1 to `max_distance` bits."""
    counts = stop - start
    owner = np.repeat(np.arange(len(hashes)), counts)
    first = np.cumsum(counts) - counts  # where the pairs of each hash begin
    other = np.arange(len(owner)) + np.repeat(start - first, counts)
    distance = np.bitwise_count(hashes[owner] ^ others[other])
    near = (distance > 0) & (distance <= max_distance)
    found = np.zeros(len(hashes), dtype=bool)
    found[owner[near]] = True
    return found
