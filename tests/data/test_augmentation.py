"""The paper's two ways to a square picture: exact ranges of what is drawn, exact pixels of what is done with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dalle1.data import augmentation as module
from dalle1.data.augmentation import (
    Augmentation,
    Crop,
    apply_crop,
    area_resize,
    augment_file,
    augment_file_epochs,
    draw_dvae,
    draw_transformer,
    enlarged_size,
    sample_rng,
)
from dalle1.data.jpeg import decode_jpeg, eighths_needed
from dalle1.data.transforms import decode_image, to_pixels

Encode = Callable[..., bytes]
Draw = Callable[[np.random.Generator, int, int, int], Crop]
BOTH: tuple[Augmentation, ...] = ("dvae", "transformer")
DRAWS = {"dvae": draw_dvae, "transformer": draw_transformer}


def noise(width: int, height: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def drawn(draw: Draw, width: int, height: int, image_size: int, n_draws: int = 600) -> dict[str, set[int]]:
    """All values that each number takes in many draws."""
    rng = sample_rng(0, 0, "ranges")
    crops = [asdict(draw(rng, width, height, image_size)) for _ in range(n_draws)]
    return {name: {crop[name] for crop in crops} for name in crops[0]}


def area_resize_by_loops(picture: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow's ResizeArea kernel with align_corners, one new pixel after the other, before rounding."""
    height, width, channels = picture.shape
    result = np.zeros((side, side, channels))
    scales = [(n - 1) / (side - 1) if side > 1 else n / side for n in (height, width)]

    def shares(new: int, scale: float) -> list[tuple[int, float]]:
        start, stop = new * scale, (new + 1) * scale
        old = range(math.floor(start), math.ceil(stop))
        return [(i, min(i + 1, stop) - max(i, start)) for i in old]

    for y in range(side):
        for x in range(side):
            for row, row_share in shares(y, scales[0]):
                for column, column_share in shares(x, scales[1]):
                    pixel = picture[min(row, height - 1), min(column, width - 1)].astype(float)
                    result[y, x] += pixel * row_share * column_share
    return result / (scales[0] * scales[1])


@pytest.mark.parametrize(("height", "width", "side"), [(7, 7, 5), (9, 13, 4), (16, 11, 11), (12, 12, 3), (5, 8, 1)])
def test_area_resize_is_tensorflows_with_aligned_corners(height: int, width: int, side: int) -> None:
    picture = noise(width, height).permute(1, 2, 0).numpy()
    resized = area_resize(picture, side, range(side), range(side))
    assert resized.dtype == np.uint8
    # Half a level for rounding, and what float32 leaves of it at a tie.
    assert np.abs(resized - area_resize_by_loops(picture, side)).max() <= 0.5 + 1e-3


def test_area_resize_gives_what_tensorflow_gave() -> None:
    picture = [
        [12, 200, 34, 90, 255, 1],
        [7, 80, 161, 242, 3, 77],
        [99, 18, 27, 36, 45, 54],
        [250, 130, 60, 5, 11, 222],
        [64, 128, 32, 16, 8, 4],
    ]
    # tf.compat.v1.image.resize_images(..., [4, 4], ResizeMethod.AREA, align_corners=True) of TensorFlow 2.21.
    theirs = [
        [74.45, 99.05, 166.4, 20.0],
        [51.4, 94.0, 70.0, 65.5],
        [168.15, 54.0, 16.8, 180.0],
        [89.6, 48.0, 11.2, 4.0],
    ]
    grey = np.repeat(np.array(picture, dtype=np.uint8)[..., None], 3, axis=2)
    assert (area_resize(grey, 4, range(4), range(4))[..., 0] == np.rint(theirs)).all()


def test_area_resize_in_numbers() -> None:
    row = np.array([0, 1, 2, 3, 5, 8, 255], dtype=np.uint8)
    picture = np.broadcast_to(row[None, :, None], (7, 7, 3))
    # 6 / 3 = 2 old pixels each; 0.5 and 2.5 go to the even neighbour; beyond the end the last one is repeated.
    assert area_resize(picture, 4, range(4), range(4))[0, :, 0].tolist() == [0, 2, 6, 255]
    # 6 / 4 = 1.5 old pixels each: (0 + 1/2) / 1.5, (1/2 + 2) / 1.5, (3 + 5/2) / 1.5, (5/2 + 8) / 1.5, 255.
    assert area_resize(picture, 5, range(5), range(5))[0, :, 0].tolist() == [0, 2, 4, 7, 255]


def test_area_resize_to_the_same_size_changes_nothing() -> None:
    picture = noise(9, 9).permute(1, 2, 0).numpy()
    assert (area_resize(picture, 9, range(9), range(9)) == picture).all()


def test_area_resize_makes_only_the_wanted_part() -> None:
    picture = noise(20, 17).permute(1, 2, 0).numpy()
    whole = area_resize(picture, 11, range(11), range(11))
    assert (area_resize(picture, 11, range(2, 9), range(3, 11)) == whole[2:9, 3:11]).all()


def test_dvae_draws_each_integer_of_its_ranges_and_no_other() -> None:
    # Side 15 of size 8: reduced to 9/8 * 8 = 9 up to 3/2 * 8 = 12.
    assert drawn(draw_dvae, 21, 15, 8) == {
        "left": set(range(7)),
        "top": {0},
        "resized_side": {9, 10, 11, 12},
        "inner_left": set(range(5)),
        "inner_top": set(range(5)),
        "flip": {False, True},
    }
    assert drawn(draw_dvae, 10, 14, 8)["resized_side"] == {9, 10}  # not above the side
    assert drawn(draw_dvae, 10, 14, 8)["top"] == set(range(5))
    assert drawn(draw_dvae, 8, 8, 8)["resized_side"] == {8}


def test_transformer_draws_each_integer_of_its_ranges_and_no_other() -> None:
    # Side 24 of size 16: reduced to 16 up to 9/8 * 16 = 18. Slack 8: from 3/8 of it, 3, to before 5/8, 5.
    assert drawn(draw_transformer, 32, 24, 16) == {
        "left": {3, 4},
        "top": {0},
        "resized_side": {16, 17, 18},
        "inner_left": {0, 1, 2},
        "inner_top": {0, 1, 2},
        "flip": {False},
    }
    assert drawn(draw_transformer, 17, 20, 16)["resized_side"] == {16, 17}


def test_sizes_at_256_pixels_are_the_papers() -> None:
    assert drawn(draw_dvae, 500, 400, 256, 3000)["resized_side"] == set(range(288, 385))
    assert drawn(draw_dvae, 500, 300, 256, 1000)["resized_side"] == set(range(288, 301))
    assert drawn(draw_dvae, 500, 270, 256)["resized_side"] == {270}
    assert drawn(draw_transformer, 500, 400, 256, 1000)["resized_side"] == set(range(256, 289))
    assert drawn(draw_transformer, 500, 260, 256)["resized_side"] == set(range(256, 261))


def test_bounds_of_other_sizes_are_rounded_down() -> None:
    assert drawn(draw_dvae, 200, 200, 60)["resized_side"] == set(range(67, 91))  # 67.5 to 90
    assert drawn(draw_transformer, 200, 200, 60)["resized_side"] == set(range(60, 68))
    assert drawn(draw_dvae, 9, 9, 1)["resized_side"] == {1}


@pytest.mark.parametrize(
    ("slack", "offsets"), [(0, {0}), (1, {0}), (2, {0}), (3, {1}), (5, {1, 2}), (8, {3, 4}), (100, set(range(37, 62)))]
)
def test_near_centre_offsets_are_rounded_as_in_the_listing(slack: int, offsets: set[int]) -> None:
    assert drawn(draw_transformer, 16 + slack, 16, 16)["left"] == offsets
    assert drawn(draw_transformer, 16, 16 + slack, 16)["top"] == offsets


@given(width=st.integers(1, 60), height=st.integers(1, 60), image_size=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_every_draw_fits_the_picture(width: int, height: int, image_size: int, seed: int) -> None:
    wide, high = enlarged_size(width, height, image_size)
    assert min(wide, high) == max(image_size, min(width, height))
    for draw in (draw_dvae, draw_transformer):
        crop = draw(sample_rng(seed, 0, 0), wide, high, image_size)
        side = min(wide, high)
        assert 0 <= crop.left <= wide - side
        assert 0 <= crop.top <= high - side
        assert image_size <= crop.resized_side <= side
        assert min(crop.inner_left, crop.inner_top) >= 0
        assert max(crop.inner_left, crop.inner_top) <= crop.resized_side - image_size
        assert apply_crop(noise(width, height), crop, image_size).shape == (3, image_size, image_size)


def test_half_of_the_dvaes_pictures_are_flipped() -> None:
    flips = Counter(draw_dvae(sample_rng(0, epoch, 0), 8, 8, 8).flip for epoch in range(400))
    assert 160 < flips[True] < 240


CROP = Crop(left=5, top=0, resized_side=6, inner_left=1, inner_top=2, flip=False)


def test_crop_is_cut_where_it_says() -> None:
    picture = noise(13, 6)
    assert torch.equal(apply_crop(picture, CROP, 4), picture[:, 2:6, 6:10])
    assert torch.equal(apply_crop(picture, replace(CROP, flip=True), 4), picture[:, 2:6, 6:10].flip(2))
    turned = Crop(left=0, top=5, resized_side=6, inner_left=2, inner_top=1, flip=False)
    assert torch.equal(apply_crop(picture.transpose(1, 2), turned, 4), picture[:, 2:6, 6:10].transpose(1, 2))


def test_crop_is_reduced_between_the_cuts() -> None:
    picture = noise(20, 12)
    crop = replace(CROP, resized_side=7)
    whole = area_resize_by_loops(picture[:, :, 5:17].permute(1, 2, 0).numpy(), 7)
    kept = apply_crop(picture, crop, 4).permute(1, 2, 0).numpy()
    assert np.abs(kept - whole[2:6, 1:5]).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("size", [(5, 3), (3, 5), (7, 7), (1, 1), (2, 9)])
def test_small_picture_is_enlarged_and_then_cropped(size: tuple[int, int]) -> None:
    picture = noise(*size)
    wide, high = enlarged_size(*size, 12)
    crop = draw_dvae(sample_rng(0, 0, 3), wide, high, 12)
    assert (crop.resized_side, crop.inner_left, crop.inner_top) == (12, 0, 0)
    whole = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((wide, high), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    expected = expected[:, crop.top : crop.top + 12, crop.left : crop.left + 12]
    expected = expected.flip(2) if crop.flip else expected
    # Pillow computes the positions of a part anew.
    assert (apply_crop(picture, crop, 12).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("augmentation", BOTH)
def test_strip_is_enlarged_only_where_it_is_cropped(encode: Encode, augmentation: Augmentation) -> None:
    # The whole would have 256 x 1,280,000 pixels.
    strip = encode(Image.new("RGB", (5000, 1)))
    assert augment_file(strip, augmentation, image_size=256, seed=0, epoch=0, key=0).shape == (3, 256, 256)


@pytest.mark.parametrize("augmentation", BOTH)
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_square_is_a_function_of_seed_epoch_and_key(
    encode: Encode, image_format: str, augmentation: Augmentation
) -> None:
    picture = encode(photo(60, 40), image_format)
    arguments = {"image_size": 16, "seed": 1, "epoch": 2, "key": 3}
    squares = [
        augment_file(picture, augmentation, **(arguments | change))  # type: ignore[arg-type]
        for change in ({}, {"seed": 9}, {"epoch": 9}, {"key": 9}, {"key": "a/9"})
    ]
    for i, square in enumerate(squares):
        assert not any(torch.equal(square, other) for other in squares[:i])
    assert torch.equal(squares[0], augment_file(picture, augmentation, **arguments))  # type: ignore[arg-type]


def test_drawn_numbers_stay_what_they_are() -> None:
    # A run that is resumed with a newer Python goes on as it would have.
    crop = draw_dvae(sample_rng(0, 1, 2), 640, 480, 256)
    assert crop == Crop(left=55, top=0, resized_side=379, inner_left=90, inner_top=112, flip=True)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of all wavelengths, the longer the stronger, as in photographs, and sharp edges."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (3, 8, 20, 50, 120):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 127.5) * 1.5 / cells**0.5
    edges = np.add.outer(np.arange(height), np.arange(width)) % 37 < 12
    return Image.fromarray((127.5 + total + 30 * edges[..., None]).clip(0, 255).astype(np.uint8))


def exactly(data: bytes, augmentation: Augmentation, image_size: int, epoch: int, background: str = "white") -> Tensor:
    """What `augment_file` is for, from the whole picture: seed and key are 0."""
    pixels = to_pixels(decode_image(data, background))
    _, height, width = pixels.shape
    size = enlarged_size(width, height, image_size)
    return apply_crop(pixels, DRAWS[augmentation](sample_rng(0, epoch, 0), *size, image_size), image_size)


@pytest.mark.parametrize("augmentation", BOTH)
@pytest.mark.parametrize("size", [(50, 40), (40, 50), (33, 33), (20, 30), (1, 1)])
def test_file_gives_exactly_what_its_pixels_give(
    encode: Encode, size: tuple[int, int], augmentation: Augmentation
) -> None:
    picture = photo(*size)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [
        encode(picture, "JPEG"),
        encode(picture, "JPEG", progressive=True, subsampling=0),
        encode(picture.convert("L"), "JPEG"),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "JPEG", exif=turned),
        encode(picture),
        encode(picture, "WEBP"),
    ]
    for data in files:
        for epoch in range(3):
            square = augment_file(data, augmentation, image_size=32, seed=0, epoch=epoch, key=0)
            assert torch.equal(square, exactly(data, augmentation, 32, epoch))


def test_transparent_parts_show_the_background(encode: Encode) -> None:
    data = encode(Image.new("RGBA", (40, 40), (0, 0, 0, 0)))
    square = augment_file(data, "dvae", image_size=32, seed=0, epoch=0, key=0, background="#010203")
    assert square.amin(dim=(1, 2)).tolist() == square.amax(dim=(1, 2)).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("size", "image_size", "eighths"), [((487, 363), 120, 4), ((363, 487), 120, 4), ((487, 363), 40, 2)]
)
def test_large_jpeg_is_close_to_its_whole(encode: Encode, size: tuple[int, int], image_size: int, eighths: int) -> None:
    data = encode(photo(*size), "JPEG", quality=95)
    errors = []
    for epoch in range(8):
        assert eighths_needed(*size, draw_dvae(sample_rng(0, epoch, 0), *size, image_size).resized_side) == eighths
        square = augment_file(data, "dvae", image_size=image_size, seed=0, epoch=epoch, key=0)
        errors.append((square.float() - exactly(data, "dvae", image_size, epoch).float()).numpy())
    # The decoder keeps more contrast than averaging does, the more so the less is left to averaging. On photographs it
    # is 34 dB at half the size and 31 dB at a quarter if nothing is, 42 and 39 dB if that is another half of the size.
    assert 10 * math.log10(255**2 / np.square(errors).mean()) > 36
    assert abs(np.mean(errors)) < 0.1


@pytest.mark.parametrize("image_size", [24, 40])
def test_large_jpeg_is_cut_where_it_says(encode: Encode, image_size: int) -> None:
    # 3 levels from one column, and one row, to the next: a shift by a fifth of a pixel is 0.6 levels.
    x, y = np.arange(243), np.arange(201)[:, None]
    levels = np.stack([abs(3 * x + 0 * y - 364), abs(0 * x + 3 * y - 300), 127 + 0 * (x + y)], axis=2).clip(0, 255)
    data = encode(Image.fromarray(levels.astype(np.uint8)), "JPEG", quality=100, subsampling=0)
    lefts = set()
    for epoch in range(20):
        crop = draw_dvae(sample_rng(0, epoch, 0), 243, 201, image_size)
        lefts.add(crop.left % 4)
        square = augment_file(data, "dvae", image_size=image_size, seed=0, epoch=epoch, key=0).float()
        error = square - exactly(data, "dvae", image_size, epoch).float()
        sign = torch.sign(square - 127)  # where the ramps rise, and where they fall
        assert abs((error * sign).mean()) < 0.3
    assert lefts == {0, 1, 2, 3}


@pytest.mark.parametrize("image_size", [24, 40])
def test_pixels_of_a_smaller_picture_are_averaged_by_the_parts_that_are_inside(encode: Encode, image_size: int) -> None:
    data = encode(photo(243, 201), "JPEG")
    differing = []
    for epoch in range(20):
        crop = draw_dvae(sample_rng(0, epoch, 0), 243, 201, image_size)
        eighths = eighths_needed(243, 201, crop.resized_side)
        small = decode_jpeg(data, 243, 201, eighths)
        assert small is not None
        # The same as a picture of the whole size in which each pixel is repeated.
        repeated = small.repeat(8 // eighths, axis=0).repeat(8 // eighths, axis=1)[:201, :243]
        expected = apply_crop(torch.from_numpy(repeated).permute(2, 0, 1), crop, image_size)
        square = augment_file(data, "dvae", image_size=image_size, seed=0, epoch=epoch, key=0)
        differing.append((square != expected).float().mean())
        assert (square.int() - expected.int()).abs().max() <= 1
    # Ties are rounded to the other side where float32 sums in another order.
    assert np.mean(differing) < 1e-3


@pytest.mark.parametrize("augmentation", BOTH)
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_crops_of_many_epochs_are_those_of_each(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, image_format: str, augmentation: Augmentation
) -> None:
    data = encode(photo(460, 130), image_format)
    decoded = []
    monkeypatch.setattr(module, "decode_jpeg", lambda *arguments: decoded.append(1) or decode_jpeg(*arguments))
    monkeypatch.setattr(module, "decode_image", lambda *arguments: decoded.append(1) or decode_image(*arguments))
    arguments = {"image_size": 50, "seed": 0, "key": "a/1"}
    epochs = [5, 0, 3, 5, 7, 11, 12]
    squares = augment_file_epochs(data, augmentation, epochs=epochs, **arguments)  # type: ignore[arg-type]
    # The whole for more than 65 pixels, half the size for fewer, which is all that the transformer draws.
    assert len(decoded) == (2 if image_format == "JPEG" and augmentation == "dvae" else 1)
    assert squares.shape == (7, 3, 50, 50)
    for square, epoch in zip(squares, epochs, strict=True):
        assert torch.equal(square, augment_file(data, augmentation, epoch=epoch, **arguments))  # type: ignore[arg-type]
    assert augment_file_epochs(data, augmentation, epochs=[], **arguments).shape == (0, 3, 50, 50)  # type: ignore[arg-type]


def outcome(make: Callable[[], Tensor]) -> Tensor | str:
    """What comes of it, or what is said against it."""
    try:
        return make()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("image_size", [8, 32])  # a quarter of the size, and the whole
@pytest.mark.parametrize("progressive", [False, True])
def test_file_that_is_cut_short_is_refused_in_pillows_words(encode: Encode, progressive: bool, image_size: int) -> None:
    data = encode(photo(64, 48), "JPEG", progressive=progressive)
    for length in range(0, len(data) - 2, 13):
        cut = data[:length]
        theirs = outcome(lambda cut=cut: to_pixels(decode_image(cut)))
        ours = outcome(lambda cut=cut: augment_file(cut, "dvae", image_size=image_size, seed=0, epoch=0, key=0))
        assert isinstance(ours, str)
        assert ours == theirs


def test_damaged_file_gets_pillows_verdict(encode: Encode) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(photo(24, 20), "JPEG"), dtype=np.uint8)
    refused = 0
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(len(data), size=2)] = rng.integers(0, 256, 2)
        file = damaged.tobytes()
        theirs = outcome(lambda file=file: exactly(file, "dvae", 16, epoch=0))
        ours = outcome(lambda file=file: augment_file(file, "dvae", image_size=16, seed=0, epoch=0, key=0))
        if isinstance(theirs, str):
            refused += 1
            assert ours == theirs
        else:
            assert isinstance(ours, Tensor)
            assert torch.equal(ours, theirs)
    assert 10 < refused < 190


def test_large_file_that_pillow_can_live_with_is_its_whole_picture(encode: Encode) -> None:
    data = encode(photo(64, 48), "JPEG")
    odd = data[:-2] + b"\0\0" + data[-2:]  # two bytes that belong to nothing
    assert decode_jpeg(data, 64, 48, 2) is not None
    assert decode_jpeg(odd, 64, 48, 2) is None
    assert torch.equal(
        augment_file(odd, "dvae", image_size=8, seed=0, epoch=0, key=0), exactly(odd, "dvae", 8, epoch=0)
    )


@pytest.mark.parametrize("data", [b"", b"no picture"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is (empty, )?not a JPEG, PNG or WebP file$"):
        augment_file(data, "dvae", image_size=8, seed=0, epoch=0, key=0)


def test_large_picture_is_averaged_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise(90, 70)
    crop = draw_dvae(sample_rng(0, 0, 0), 90, 70, 32)
    whole = apply_crop(picture, crop, 32)
    for at_once in (1, 5_000):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        assert torch.equal(apply_crop(picture, crop, 32), whole)


def test_squares_stay_what_they_are_when_others_are_made_beside_them(encode: Encode) -> None:
    files = [encode(photo(40 + 9 * i, 50, seed=i), "JPEG") for i in range(6)]

    def make(data: bytes) -> Tensor:
        return augment_file(data, "dvae", image_size=32, seed=0, epoch=0, key=0)

    with ThreadPoolExecutor(3) as pool:
        squares = list(pool.map(make, files * 5))
    for square, data in zip(squares, files * 5, strict=True):
        assert torch.equal(square, exactly(data, "dvae", 32, epoch=0))
