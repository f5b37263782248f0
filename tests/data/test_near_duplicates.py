"""Perceptual hashes of pictures, and which of them are near an earlier one."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from dalle1.data import near_duplicates as module
from dalle1.data.near_duplicates import MAX_DISTANCE, hash_file, near_duplicates, perceptual_hash
from dalle1.data.transforms import decode_image

Encode = Callable[..., bytes]


def picture(seed: int, width: int = 300, height: int = 200) -> Image.Image:
    """Soft random patches of light, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def distance(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def duplicates(hashes: list[int], max_distance: int) -> list[bool]:
    return near_duplicates(np.array(hashes, dtype=np.uint64), max_distance).tolist()


def error(function: Callable[[bytes], object], data: bytes) -> str:
    """What it says in refusing a file."""
    try:
        function(data)
    except ValueError as refused:
        return str(refused)
    pytest.fail("the file is taken")


def found_one_by_one(hashes: list[int], max_distance: int) -> list[bool]:
    """The definition: near one of those that stay."""
    stay: list[int] = []
    found = []
    for value in hashes:
        found.append(any(distance(value, other) <= max_distance for other in stay))
        if not found[-1]:
            stay.append(value)
    return found


def test_hash_is_that_of_imagehash() -> None:
    # imagehash.phash of ImageHash 4.3.2
    y, x = np.mgrid[0:48, 0:64]
    stripes = np.stack([4 * x, 5 * y, x * y], axis=-1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert perceptual_hash(Image.fromarray(stripes)) == 0x80031F3F3E787971
    assert perceptual_hash(Image.fromarray(noise)) == 0xD0D3259BBA41DC8B


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_picture_have_nearly_its_hash(encode: Encode, seed: int) -> None:
    original = picture(seed)
    copies = [
        original.resize((100, 67), Image.Resampling.BILINEAR),
        Image.open(io.BytesIO(encode(original, "JPEG", quality=30))),
        ImageEnhance.Contrast(original).enhance(0.8),
        original.convert("L"),
    ]
    assert max(distance(perceptual_hash(original), perceptual_hash(copy)) for copy in copies) <= 4


def test_other_pictures_have_other_hashes() -> None:
    hashes = [perceptual_hash(picture(seed)) for seed in range(40)]
    assert min(distance(first, second) for first, second in combinations(hashes, 2)) > MAX_DISTANCE


def test_hashes_have_64_bits_half_of_them_ones() -> None:
    hashes = [perceptual_hash(picture(seed)) for seed in range(10)]
    assert {value.bit_count() for value in hashes} == {32}
    assert max(hashes) < 1 << 64


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 64), (1, 900)])
def test_pictures_of_one_color_have_one_hash(size: tuple[int, int]) -> None:
    hashes = {perceptual_hash(Image.new("RGB", size, color)) for color in ("white", "red", "#010101", "gray")}
    assert hashes == {1 << 63}
    assert perceptual_hash(Image.new("RGB", size, "black")) == 0


def test_hash_does_not_see_colors_of_the_same_brightness() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[20:50, 10:40] = (200, 0, 0)
    red = Image.fromarray(pixels)
    pixels[20:50, 10:40] = (0, 102, 0)
    assert perceptual_hash(red) == perceptual_hash(Image.fromarray(pixels))


@pytest.mark.parametrize("size", [(100, 80), (600, 400), (801, 1203)])
def test_jpeg_has_nearly_the_hash_of_its_picture(encode: Encode, size: tuple[int, int]) -> None:
    for seed in range(4):
        data = encode(picture(seed, *size), "JPEG")
        assert distance(hash_file(data), perceptual_hash(decode_image(data))) <= 2


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_other_file_has_the_hash_of_its_picture(encode: Encode, image_format: str) -> None:
    data = encode(picture(0), image_format)
    assert hash_file(data) == perceptual_hash(decode_image(data))


def test_large_jpeg_is_decoded_at_a_part_of_its_size(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    resize = Image.Image.resize

    def note(image: Image.Image, *args: object, **options: object) -> Image.Image:
        decoded.append(image.size)
        return resize(image, *args, **options)  # type: ignore[arg-type]

    data = encode(picture(0, 1600, 1200), "JPEG")
    monkeypatch.setattr(Image.Image, "resize", note)
    hash_file(data)
    assert decoded == [(200, 150)]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_modes_is_hashed(encode: Encode, mode: str) -> None:
    image = picture(1)
    assert distance(hash_file(encode(image.convert(mode), "JPEG")), perceptual_hash(image)) <= 4


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_turned_picture_has_the_hash_of_the_upright_one(encode: Encode, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    upright = picture(2)
    stored = encode(upright.transpose(Image.Transpose.ROTATE_90), image_format, exif=exif)
    assert distance(hash_file(stored), perceptual_hash(upright)) <= 4
    assert (
        distance(
            hash_file(encode(upright.transpose(Image.Transpose.ROTATE_90), image_format)), perceptual_hash(upright)
        )
        > 10
    )


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5])
def test_damaged_file_is_refused_as_by_decode_image(encode: Encode, image_format: str, share: float) -> None:
    data = encode(picture(3), image_format)
    cut = data[: int(share * len(data))]
    assert error(hash_file, cut) == error(decode_image, cut)


def test_picture_above_100_megapixels_is_refused(encode: Encode) -> None:
    data = bytearray(encode(Image.new("L", (16, 16)), "JPEG"))
    start = data.index(b"\xff\xc0")  # the frame's header
    data[start + 5 : start + 9] = (10_500).to_bytes(2, "big") + (10_000).to_bytes(2, "big")
    with pytest.raises(ValueError, match=r"105\.0 megapixels, more than the 100 allowed"):
        hash_file(bytes(data))


def test_first_of_equal_hashes_stays() -> None:
    assert duplicates([7, 9, 7, 7, 9, 1 << 63], 0) == [False, False, True, True, True, False]


def test_distance_counts_bits() -> None:
    assert duplicates([0, 0b111], 3) == [False, True]
    assert duplicates([0, 0b111], 2) == [False, False]
    assert duplicates([0, (1 << 64) - 1], 6) == [False, False]


def test_what_is_near_a_dropped_one_only_stays() -> None:
    chain = [0b0, 0b1, 0b11, 0b111, 0b1111]
    assert duplicates(chain, 1) == [False, True, False, True, False]
    assert duplicates(chain[::-1], 1) == [False, True, False, True, False]
    assert duplicates([chain[i] for i in (1, 0, 2, 3, 4)], 1) == [False, True, True, False, True]


def test_no_hashes_have_no_duplicates() -> None:
    assert duplicates([], 0) == duplicates([], 3) == []


@given(
    centers=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=5)), max_size=60),
    max_distance=st.integers(0, MAX_DISTANCE),
    few=st.sampled_from([1, 3, 256]),
    pairs_at_once=st.sampled_from([1, 7, 1 << 22]),
)
@settings(max_examples=150, deadline=None)
def test_search_finds_what_comparing_all_pairs_does(
    centers: list[int], flips: list[tuple[int, set[int]]], max_distance: int, few: int, pairs_at_once: int
) -> None:
    hashes = [centers[i % len(centers)] ^ sum(1 << bit for bit in bits) for i, bits in flips]
    with pytest.MonkeyPatch.context() as patched:  # so small that few hashes need all of the search
        patched.setattr(module, "_FEW", few)
        patched.setattr(module, "_PAIRS_AT_ONCE", pairs_at_once)
        assert duplicates(hashes, max_distance) == found_one_by_one(hashes, max_distance)


@pytest.mark.parametrize("max_distance", [1, 3, 6])
def test_copies_are_found_among_many(max_distance: int) -> None:
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    copies = rng.permutation(originals)[:2000]
    for _ in range(max_distance):
        copies = copies ^ (np.uint64(1) << rng.integers(0, 64, len(copies)).astype(np.uint64))
    found = near_duplicates(np.concatenate([originals, copies]), max_distance)
    assert not found[: len(originals)].any()
    assert found[len(originals) :].all()


@pytest.mark.parametrize("max_distance", [-1, 7])
def test_distance_outside_the_range_is_refused(max_distance: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 6\] bits, got {max_distance}$"):
        near_duplicates(np.zeros(2, dtype=np.uint64), max_distance)


def test_hashes_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be uint64 in one dimension, got int64 in 1$"):
        near_duplicates(np.zeros(2, dtype=np.int64), 0)
