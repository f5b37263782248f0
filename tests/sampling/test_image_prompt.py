"""What stays of a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1.sampling.image_prompt import ImagePrompt, keep_top_rows, kept_outside

GRID, CELL = (3, 4), 4


def _mask(size: tuple[int, int], *white: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    for pixel in white:
        mask.putpixel(pixel, 255)
    return mask


def test_top_rows_stay() -> None:
    assert keep_top_rows(2, GRID).tolist() == [[True] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (3, ValueError, "keep_rows must leave some of the 3 rows of tokens to sample, got 3"),
        (0, ValueError, "keep_rows must be >= 1, got 0"),
        (1.5, TypeError, "keep_rows must be an integer >= 1, got 1.5"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keep_top_rows(rows, GRID)


@pytest.mark.parametrize(
    ("size", "pixel", "cell"),
    [
        ((4, 3), (3, 1), (1, 3)),  # a pixel for each token
        ((16, 12), (15, 7), (1, 3)),  # as the model sees it: one pixel of a cell is enough
        ((160, 240), (159, 120), (1, 3)),  # as the picture is: 160 x 120 pixels in its middle are seen
    ],
)
def test_white_cells_are_sampled_again(size: tuple[int, int], pixel: tuple[int, int], cell: tuple[int, int]) -> None:
    kept = kept_outside(_mask(size, pixel), picture_size=(160, 240), grid=GRID, cell=CELL)
    expected = torch.ones(GRID, dtype=torch.bool)
    expected[cell] = False
    assert torch.equal(kept, expected)


def test_grey_is_white_above_the_middle() -> None:
    levels = np.full((3, 4), 127, dtype=np.uint8)
    levels[0, 1] = 128
    kept = kept_outside(Image.fromarray(levels), picture_size=(16, 12), grid=GRID, cell=CELL)
    assert kept.flatten().tolist() == [True, False, *[True] * 10]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (_mask((3, 4)), "mask must have the size of its picture, 40 x 30 or 16 x 12 or 4 x 3 pixels, got 3 x 4"),
        (_mask((4, 3)), "it is black everywhere"),
        (Image.new("L", (40, 30), 255), "it is white everywhere"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept_outside(mask, picture_size=(40, 30), grid=GRID, cell=CELL)


def test_given_tokens_and_kept_pixels() -> None:
    kept = torch.tensor([[True, False]])
    prompt = ImagePrompt(image=torch.full((3, 2, 4), 0.5), image_tokens=torch.tensor([[7, 8]]), kept=kept)
    assert prompt.given.tolist() == [[7, -1]]
    assert (prompt.shown[:, :, :2] == 0.5).all()
    assert (prompt.shown[:, :, 2:] != 0.5).all()
    sampled = torch.zeros(1, 3, 2, 4)
    assert prompt.paste(sampled) is sampled
    pasting = ImagePrompt(image=prompt.image, image_tokens=prompt.image_tokens, kept=kept, paste_kept=True)
    assert pasting.paste(sampled)[0, 0].tolist() == [[0.5, 0.5, 0, 0]] * 2
