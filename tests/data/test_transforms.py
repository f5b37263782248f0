"""From picture files to pixels: formats, colour modes, orientation, crop and resize."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1.data.transforms import crop_and_resize, decode_image, to_unit_interval

Encode = Callable[..., bytes]


@pytest.mark.parametrize(("image_format", "tolerance"), [("PNG", 0), ("JPEG", 3), ("WEBP", 3)])
def test_decode_reads_each_format(encode: Encode, image_format: str, tolerance: int) -> None:
    image = decode_image(encode(Image.new("RGB", (16, 8), (200, 100, 50)), image_format))
    assert (image.mode, image.size) == ("RGB", (16, 8))
    # Lossy formats round their coefficients.
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_decode_turns_grey_and_palette_into_rgb(encode: Encode, mode: str) -> None:
    image = decode_image(encode(Image.new("RGB", (4, 4), "white").convert(mode)))
    assert image.mode == "RGB"
    assert (np.asarray(image) == 255).all()


def test_decode_turns_cmyk_into_rgb(encode: Encode) -> None:
    image = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = np.asarray(image)[4, 4].tolist()
    assert red > 250
    # Lossy, as above.
    assert max(green, blue) < 5


def test_decode_keeps_the_upper_bits_of_16_bit_grey(encode: Encode) -> None:
    levels = np.array([[0, 0x1234], [0x8000, 0xFFFF]], dtype=np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(levels))))
    assert (pixels == np.array([[0, 0x12], [0x80, 0xFF]])[..., None]).all()


def test_decode_puts_transparent_pictures_on_white(encode: Encode) -> None:
    half_black = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    for mode in ("RGBA", "LA"):
        assert (np.asarray(decode_image(encode(half_black.convert(mode)))) == 127).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert (np.asarray(decode_image(encode(palette, transparency=0))) == 255).all()


def test_decode_turns_the_picture_upright(encode: Encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by 90 degrees
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    upright = decode_image(encode(image, exif=exif))
    assert upright.size == (2, 3)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"", b"no picture"])
def test_decode_refuses_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a JPEG, PNG or WebP file"):
        decode_image(data)


def test_decode_refuses_other_formats(encode: Encode) -> None:
    with pytest.raises(ValueError, match="not a JPEG, PNG or WebP file"):
        decode_image(encode(Image.new("RGB", (4, 4)), "BMP"))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_decode_refuses_a_cut_file(encode: Encode, image_format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"^.+"):
        decode_image(encode(noise, image_format)[:-500])


@pytest.mark.parametrize(
    ("height", "message"), [(10_500, r"105\.0 megapixels, more than the 100"), (20_000, "more than the 100")]
)
def test_decode_refuses_a_decompression_bomb(encode: Encode, height: int, message: str) -> None:
    # Only the header says so; its checksum is made right again.
    data = bytearray(encode(Image.new("1", (10_000, 1))))
    data[20:24] = height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match=message):
        decode_image(bytes(data))


def test_damaged_files_raise_nothing_but_value_error(encode: Encode) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    files = [np.frombuffer(encode(noise, image_format), dtype=np.uint8) for image_format in ("PNG", "JPEG", "WEBP")]
    refused = 0
    for i in range(300):
        damaged = files[i % 3].copy()
        damaged[rng.integers(len(damaged), size=4)] = rng.integers(0, 256, 4)
        try:
            assert decode_image(damaged.tobytes()).mode == "RGB"
        except ValueError:
            refused += 1
    # Bytes changed in the pixels' data are often a picture still.
    assert 30 < refused < 300


@pytest.mark.parametrize("size", [(9, 5), (5, 9)])
def test_crop_takes_the_centred_square(size: tuple[int, int]) -> None:
    width, height = size
    picture = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    pixels = crop_and_resize(Image.fromarray(picture).convert("RGB"), 5)
    top, left = (height - 5) // 2, (width - 5) // 2
    assert (pixels[0].numpy() == picture[top : top + 5, left : left + 5]).all()


def test_shrinking_averages_the_area_of_each_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    pixels = crop_and_resize(Image.fromarray(picture), 4)
    means = picture.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))
    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == torch.uint8
    # Rounding to 8 bits, once per axis.
    assert np.abs(pixels.permute(1, 2, 0).numpy() - means).max() <= 1


def test_enlarging_gives_smooth_pixels() -> None:
    picture = np.array([[0, 200], [0, 200]], dtype=np.uint8)
    row = crop_and_resize(Image.fromarray(picture).convert("RGB"), 8)[0, 0].tolist()
    assert row == sorted(row)
    assert len(set(row)) > 4


def test_unit_interval_maps_0_to_0_and_255_to_1() -> None:
    image = to_unit_interval(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1))
    assert image.dtype == torch.float32
    assert torch.equal(image.flatten(), torch.tensor([0.0, 0.2, 1.0]))
