"""From picture files to pixels: formats, colour modes, orientation, crop and resize."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1.data.transforms import (
    crop_and_resize,
    decode_image,
    fit_picture,
    parse_color,
    picture_size,
    read_header,
    to_pixels,
    to_unit_interval,
)

Encode = Callable[..., bytes]
GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # colour types of PNG


def chunk(name: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(levels: list[list[object]], color_type: int, *chunks: bytes, bits: int = 16) -> bytes:
    """A PNG as Pillow does not write it: 16 bits, or with any chunks before the pixels."""
    pixels = np.array(levels)
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{bits // 8}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def colors(image: Image.Image) -> list[list[int]]:
    """The pixels of the first row."""
    return np.asarray(image)[0].tolist()


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


def test_decode_turns_ycck_into_rgb(encode: Encode) -> None:
    # Pillow writes CMYK as Adobe does, inverted: 255 - these are the planes Y, Cb, Cr = (76, 85, 255), red, and K.
    data = encode(Image.new("CMYK", (8, 8), (255 - 76, 255 - 85, 0, 0)), "JPEG", quality=100)
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    # As YCCK, the planes say that 255 minus red is the inverse of the ink: no red light is left, and no black is added.
    red, green, blue = colors(decode_image(data[:transform] + b"\x02" + data[transform + 1 :]))[4]
    assert red < 5
    assert min(green, blue) > 250


def test_decode_keeps_the_upper_bits_of_every_16_bit_kind() -> None:
    assert colors(decode_image(png([[[0x1234, 0x8000, 0xFFFF]]], RGB))) == [[0x12, 0x80, 0xFF]]
    assert colors(decode_image(png([[[0x1234, 0xFFFF], [0x1234, 0]]], GREY_ALPHA))) == [[0x12] * 3, [255] * 3]
    assert colors(decode_image(png([[[0x1234, 0, 0x80FF, 0xFFFF], [1, 2, 3, 0]]], RGBA))) == [
        [0x12, 0, 0x80],
        [255] * 3,
    ]


def test_decode_knows_the_transparent_level_of_16_bit_grey() -> None:
    transparent = chunk(b"tRNS", struct.pack(">H", 0x1234))
    assert colors(decode_image(png([[0x1234, 0x1235, 0xFF00]], GREY, transparent))) == [
        [255] * 3,
        [0x12] * 3,
        [255] * 3,
    ]


@pytest.mark.parametrize(
    ("background", "shown"), [("red", (127, 0, 0)), ("#0000ff", (0, 0, 127)), ("#fff", (127,) * 3)]
)
def test_decode_puts_transparent_parts_on_the_background(
    encode: Encode, background: str, shown: tuple[int, int, int]
) -> None:
    half_black = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    for mode in ("RGBA", "LA"):
        assert tuple(colors(decode_image(encode(half_black.convert(mode)), background))[0]) == shown
    assert colors(decode_image(encode(half_black.convert("RGB")), background))[0] == [0, 0, 0]


@pytest.mark.parametrize("name", ["whit", "#12345", "", None, 255])
def test_unknown_color_gets_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=f"must be a name such as 'white', or '#rrggbb', got {name!r}$"):
        parse_color(name)


def test_transparent_color_is_refused() -> None:
    with pytest.raises(ValueError, match="a colour must be opaque, got '#ff000080'; leave out its alpha value"):
        parse_color("#ff000080")


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_knows_every_orientation(encode: Encode, orientation: int) -> None:
    upright = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    # Where the upright picture's first row and first column lie in the file, by the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image_format in ("PNG", "WEBP"):
        data = encode(Image.fromarray(np.ascontiguousarray(stored)), image_format, exif=exif, lossless=True)
        assert (np.asarray(decode_image(data)) == upright).all()


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01",  # ends in its first entry
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x05\0\0\0\xff\0\0\0\0\0\0\0",  # points beyond its end
    ],
)
def test_damaged_exif_data_are_ignored_without_a_warning(encode: Encode, exif: bytes) -> None:
    assert decode_image(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_decode_takes_the_first_picture_of_an_animation(encode: Encode, image_format: str) -> None:
    first, *others = (Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime"))
    data = encode(first, image_format, save_all=True, append_images=others, lossless=True)
    assert colors(decode_image(data))[0] == [255, 0, 0]


def test_decode_takes_the_first_picture_of_a_jpeg_with_several(encode: Encode) -> None:
    first, second = (Image.new("RGB", (8, 8), color) for color in ("black", "white"))
    assert colors(decode_image(encode(first, "MPO", save_all=True, append_images=[second])))[0] == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_pictures_of_extreme_shape_are_cropped_and_resized(encode: Encode, size: tuple[int, int]) -> None:
    image = decode_image(encode(Image.new("RGB", size, "red")))
    assert image.size == size
    assert (crop_and_resize(image, 8)[0] == 255).all()


@pytest.mark.parametrize("data", [b"", b"no picture"])
def test_decode_refuses_what_is_no_picture(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is (empty, )?not a JPEG, PNG or WebP file$"):
        decode_image(data)


@pytest.mark.parametrize("image_format", ["BMP", "GIF", "TIFF"])
def test_decode_refuses_other_formats(encode: Encode, image_format: str) -> None:
    with pytest.raises(ValueError, match="not a JPEG, PNG or WebP file"):
        decode_image(encode(Image.new("RGB", (4, 4)), image_format))


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_decode_refuses_a_file_cut_anywhere(encode: Encode, image_format: str, options: dict[str, bool]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    data = encode(noise, image_format, **options)
    whole = np.asarray(decode_image(data))
    messages = []
    for length in range(0, len(data), 7):
        try:
            cut = decode_image(data[:length])
        except ValueError as error:
            messages.append(str(error))
        else:
            # What comes after the pixels may be missing.
            assert (np.asarray(cut) == whole).all()
            assert length > len(data) - 30
    assert len(messages) > 10
    assert all(message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("name", "head"),
    [(b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")],
    ids=["zTXt", "iCCP", "iTXt"],
)
def test_decode_refuses_text_that_unpacks_to_megabytes(name: bytes, head: bytes) -> None:
    bomb = chunk(name, head + zlib.compress(bytes(4_000_000)))
    with pytest.raises(ValueError, match=r"^Decompressed data too large"):
        decode_image(png([[[1, 2, 3]]], RGB, bomb, bits=8))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "^it needs more memory than there is$"),
        (RuntimeError("two\nlines"), "^two lines$"),
        (EOFError(), "^EOFError$"),
        (KeyError(7), "^7$"),
    ],
)
def test_whatever_pillow_raises_is_one_sentence(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match=message):
        decode_image(encode(Image.new("RGB", (4, 4))))


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_size_is_that_of_the_decoded_picture(encode: Encode, image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.new("RGB", (20, 10), "red"), image_format, exif=exif)
    assert picture_size(data) == decode_image(data).size == ((20, 10) if orientation <= 4 else (10, 20))


@pytest.mark.parametrize(("name", "head"), [(b"eXIf", b""), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0")])
def test_size_knows_a_png_that_is_turned_by_what_comes_after_its_pixels(
    encode: Encode, name: bytes, head: bytes
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turn = exif.tobytes().removeprefix(b"Exif\0\0") if name == b"eXIf" else b'<x tiff:Orientation="6"/>'
    data = encode(Image.new("RGB", (20, 10)))
    end = data.rindex(b"IEND") - 4
    data = data[:end] + chunk(name, head + turn) + data[end:]
    assert picture_size(data) == decode_image(data).size == (10, 20)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_size_is_read_without_the_pixels(encode: Encode, image_format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8))
    data = encode(noise, image_format)
    assert picture_size(data[: len(data) // 2]) == (80, 90)


def test_header_tells_plain_jpegs_from_what_is_to_be_turned_or_converted(encode: Encode) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x tiff:Orientation="3"/>'
    plain = [
        encode(picture, "JPEG"),
        encode(picture.convert("L"), "JPEG"),
        encode(picture, "JPEG", exif=Image.Exif()),
        encode(picture, "JPEG", xmp=b"<x/>"),
        encode(picture, "JPEG", keep_rgb=True),
    ]
    others = [
        encode(picture),
        encode(picture, "WEBP"),
        encode(picture, "JPEG", exif=exif),
        encode(picture, "JPEG", xmp=xmp),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "MPO", save_all=True, append_images=[picture]),
    ]
    assert [read_header(data).is_plain_jpeg for data in plain + others] == [True] * 5 + [False] * 6


@pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_has_no_size(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is (empty, )?not a JPEG, PNG or WebP file$"):
        picture_size(data)


@pytest.mark.parametrize("exif", [{}, {"exif": b"Exif\0\0garbage"}])
def test_jpeg_that_is_a_decompression_bomb_is_refused_by_its_header(encode: Encode, exif: dict[str, bytes]) -> None:
    data = bytearray(encode(Image.new("L", (8, 8)), "JPEG", **exif))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (10_500).to_bytes(2, "big") + (10_000).to_bytes(2, "big")
    for read in (picture_size, decode_image):
        with pytest.raises(ValueError, match=r"^it has 105\.0 megapixels, more than the 100 allowed$"):
            read(bytes(data))


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


@pytest.mark.parametrize(("width", "height"), [(5, 5), (8, 8), (13, 6), (6, 13), (40, 21), (1, 9)])
def test_square_is_fitted_as_it_always_was(width: int, height: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    resample = Image.Resampling.BOX if side >= 6 else Image.Resampling.BICUBIC
    expected = picture.resize((6, 6), resample, box=(left, top, left + side, top + side))
    assert torch.equal(crop_and_resize(picture, 6), to_pixels(expected))
    assert torch.equal(fit_picture(picture, 6, 6), to_pixels(expected))


@pytest.mark.parametrize(
    ("size", "crop"),
    [
        ((12, 16), (0, 0, 12, 16)),  # height and width in pixels; top, left, height, width of what is averaged
        ((12, 21), (0, 2, 12, 16)),
        ((15, 16), (1, 0, 12, 16)),
    ],
)
def test_largest_centred_crop_of_the_aspect_is_averaged(size: tuple[int, int], crop: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    top, left, height, width = crop
    pixels = fit_picture(Image.fromarray(picture), 3, 4)
    means = picture[top : top + height, left : left + width].reshape(3, 4, 4, 4, 3).mean(axis=(1, 3))
    assert pixels.shape == (3, 3, 4)
    # Rounding to 8 bits, once per axis.
    assert np.abs(pixels.permute(1, 2, 0).numpy() - means).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 3), (23, 31), (24, 32), (25, 33)])
def test_any_picture_can_be_fitted_and_a_uniform_one_stays_so(height: int, width: int) -> None:
    pixels = fit_picture(Image.new("RGB", (width, height), (10, 100, 200)), 24, 32)
    assert torch.equal(pixels, torch.tensor([10, 100, 200], dtype=torch.uint8)[:, None, None].expand(3, 24, 32))


def test_enlarging_gives_smooth_pixels() -> None:
    picture = np.array([[0, 200], [0, 200]], dtype=np.uint8)
    row = crop_and_resize(Image.fromarray(picture).convert("RGB"), 8)[0, 0].tolist()
    assert row == sorted(row)
    assert len(set(row)) > 4


def test_pixels_of_a_whole_picture_are_planes(encode: Encode) -> None:
    pixels = to_pixels(Image.new("RGB", (3, 2), (1, 2, 3)))
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 2, 3))


def test_unit_interval_maps_0_to_0_and_255_to_1() -> None:
    image = to_unit_interval(torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1))
    assert image.dtype == torch.float32
    assert torch.equal(image.flatten(), torch.tensor([0.0, 0.2, 1.0]))
