"""The paper's two ways to a square picture: exact ranges of what is drawn, exact pixels of what is done with it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dalle1.data.augmentation import (
    Augmentation,
    Crop,
    apply_crop,
    area_resize,
    augment,
    draw_dvae,
    draw_transformer,
    enlarged_size,
    sample_rng,
)

Draw = Callable[[np.random.Generator, int, int, int], Crop]
BOTH: tuple[Augmentation, ...] = ("dvae", "transformer")


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
def test_strip_is_enlarged_only_where_it_is_cropped(augmentation: Augmentation) -> None:
    # The whole would have 256 x 1,280,000 pixels.
    strip = noise(5000, 1)
    square = augment(strip, augmentation, image_size=256, seed=0, epoch=0, key=0)
    assert square.shape == (3, 256, 256)


@pytest.mark.parametrize("augmentation", BOTH)
def test_square_is_a_function_of_seed_epoch_and_key(augmentation: Augmentation) -> None:
    picture = noise(60, 40)
    before = picture.clone()
    arguments = {"image_size": 16, "seed": 1, "epoch": 2, "key": 3}
    squares = [
        augment(picture, augmentation, **(arguments | change))  # type: ignore[arg-type]
        for change in ({}, {"seed": 9}, {"epoch": 9}, {"key": 9}, {"key": "a/9"})
    ]
    for i, square in enumerate(squares):
        assert not any(torch.equal(square, other) for other in squares[:i])
    assert torch.equal(squares[0], augment(picture, augmentation, **arguments))  # type: ignore[arg-type]
    assert torch.equal(picture, before)
    # However the picture lies in memory.
    again = picture.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(squares[0], augment(again, augmentation, **arguments))  # type: ignore[arg-type]


def test_drawn_numbers_stay_what_they_are() -> None:
    # A run that is resumed with a newer NumPy goes on as it would have.
    crop = draw_dvae(sample_rng(0, 1, 2), 640, 480, 256)
    assert crop == Crop(left=50, top=0, resized_side=349, inner_left=20, inner_top=32, flip=True)
