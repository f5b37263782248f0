"""JPEG files at a fraction of their size: which files, which fraction, which pixels, and that damage is noticed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from dalle1.data.jpeg import decode_jpeg, eighths_needed, plain_jpeg_size
from dalle1.data.transforms import decode_image

Encode = Callable[..., bytes]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("L", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"comment": b"a comment"}),
        ("RGB", {"restart_marker_blocks": 2}),
    ],
)
def test_size_of_a_plain_jpeg_is_read_from_its_first_bytes(
    encode: Encode, mode: str, options: dict[str, object]
) -> None:
    data = encode(noise(31, 18, mode), "JPEG", **options)
    assert plain_jpeg_size(data) == (31, 18)
    pixels = data.rindex(b"\xff\xda")
    assert plain_jpeg_size(data[: pixels + 4]) == (31, 18)
    assert plain_jpeg_size(data[:20]) is None


def test_files_that_say_more_of_themselves_are_left_to_others(encode: Encode) -> None:
    picture = noise(31, 18)
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(picture, "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    others = {
        "nothing": b"",
        "text": b"no picture",
        "PNG": encode(picture),
        "turned": encode(picture, "JPEG", exif=exif),
        "CMYK": encode(picture.convert("CMYK"), "JPEG"),
        "red, green and blue as they are": encode(picture, "JPEG", keep_rgb=True),
        "two pictures": encode(picture, "MPO", save_all=True, append_images=[picture]),
        "12 bits": jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],
        "no rows": jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :],
        "two sizes": jpeg[:frame] + jpeg[frame : frame + 19] + jpeg[frame:],
        "arithmetic coding": jpeg[: frame + 1] + b"\xc9" + jpeg[frame + 2 :],
    }
    assert {name: plain_jpeg_size(data) for name, data in others.items()} == dict.fromkeys(others)


@pytest.mark.parametrize(
    ("resized_side", "eighths"), [(128, 2), (129, 4), (256, 4), (257, 8), (384, 8), (512, 8), (600, 8)]
)
def test_as_many_pixels_as_needed_are_decoded(resized_side: int, eighths: int) -> None:
    # A quarter of 512 is 128, half of it is 256.
    assert eighths_needed(512, 700, resized_side) == eighths
    assert eighths_needed(700, 512, resized_side) == eighths


def test_picture_of_a_few_pixels_is_decoded_as_it_is() -> None:
    assert eighths_needed(7, 900, 1) == 8
    assert eighths_needed(8, 900, 1) == 2


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *[("RGB", {"subsampling": subsampling}) for subsampling in ("4:4:4", "4:2:2", "4:2:0")],
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
    ],
)
@pytest.mark.parametrize("size", [(64, 48), (61, 43), (1, 9)])
def test_whole_pictures_are_pillows(
    encode: Encode, size: tuple[int, int], mode: str, options: dict[str, object]
) -> None:
    data = encode(noise(*size, mode), "JPEG", **options)
    pixels = decode_jpeg(data, *size, 8)
    assert pixels is not None
    assert (pixels == np.asarray(decode_image(data))).all()


@pytest.mark.parametrize("eighths", [2, 4])
@pytest.mark.parametrize("size", [(64, 48), (61, 43), (8, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_each_pixel_of_a_smaller_picture_is_the_mean_of_those_it_covers(
    encode: Encode, mode: str, size: tuple[int, int], eighths: int
) -> None:
    width, height = size
    x, y = np.arange(width), np.arange(height)[:, None]
    levels = np.stack([3 * x + 0 * y, 0 * x + 4 * y, 200 - x - 2 * y], axis=2).astype(np.uint8)
    data = encode(Image.fromarray(levels).convert(mode), "JPEG", quality=100, subsampling=0)
    pixels = decode_jpeg(data, *size, eighths)
    assert pixels is not None
    n = 8 // eighths
    assert pixels.shape == (-(-height // n), -(-width // n), 3)
    whole = np.asarray(decode_image(data)).astype(float)[: height // n * n, : width // n * n]
    means = whole.reshape(height // n, n, width // n, n, 3).mean(axis=(1, 3))
    # A slope of 4 levels: half a pixel beside would be 2. Within half a level are rounding and JPEG's own error.
    inside = pixels[: height // n, : width // n] - means
    assert np.abs(inside.mean(axis=(0, 1))).max() < 0.3
    assert np.abs(inside).mean() < 0.7


@pytest.mark.parametrize("eighths", [4, 8])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_what_is_cut_short_is_refused(encode: Encode, options: dict[str, bool], eighths: int) -> None:
    data = encode(noise(32, 32), "JPEG", **options)
    assert decode_jpeg(data, 32, 32, eighths) is not None
    for length in range(0, len(data), 11):
        assert decode_jpeg(data[:length], 32, 32, eighths) is None


def test_what_is_damaged_is_refused_or_is_what_pillow_makes_of_it(encode: Encode) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(noise(32, 32), "JPEG"), dtype=np.uint8)
    refused = 0
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(len(data), size=2)] = rng.integers(0, 256, 2)
        pixels = decode_jpeg(damaged.tobytes(), 32, 32, 8)
        if pixels is None:
            refused += 1
        else:
            assert (pixels == np.asarray(decode_image(damaged.tobytes()))).all()
    assert 50 < refused < 200


def test_another_size_than_was_said_is_refused(encode: Encode) -> None:
    data = encode(noise(32, 32), "JPEG")
    assert decode_jpeg(data, 32, 40, 8) is None
    assert decode_jpeg(data, 40, 32, 4) is None
