"""Pages of captioned pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from dalle1.picture_grid import GridBlock, draw_grids, draw_page, drawable, wrap


def _block(n_pictures: int = 1, side: int = 32, title: str = "a title", captions: tuple[str, ...] = ()) -> GridBlock:
    pictures = [Image.new("RGB", (side, side), (255, 10 * i, 0)) for i in range(n_pictures)]
    return GridBlock(title=title, pictures=pictures, captions=captions)


def _area(page: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(page) == color).all(axis=2).sum())


def test_small_pictures_are_enlarged_crisply_to_128_pixels() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    (page,) = draw_grids([GridBlock(title="t", pictures=[picture], captions=())])
    colors = {tuple(color) for color in np.asarray(picture).reshape(-1, 3)[:, :].tolist()}
    assert all(_area(page, color) % 16 == 0 for color in list(colors)[:50]), "4 x 4 equal pixels each"


def test_long_thin_pictures_are_not_enlarged_beyond_1024_pixels() -> None:
    picture = Image.new("RGB", (500, 2), (255, 0, 0))
    assert _area(draw_page([GridBlock(title="t", pictures=[picture])]), (255, 0, 0)) == 1000 * 4


def test_rows_of_pictures_stand_below_their_titles() -> None:
    row = [Image.new("RGB", (128, 128), (255, 10 * i, 0)) for i in range(5)]
    page = draw_page([GridBlock(title=title, pictures=row, columns=5) for title in ("original", "hard")])
    assert page.width >= 5 * 128
    lefts = [np.argwhere((np.asarray(page) == (255, 10 * i, 0)).all(axis=2)).min(axis=0)[1] for i in range(5)]
    assert lefts == sorted(lefts)
    assert _area(page, (255, 0, 0)) == 2 * 128 * 128


def test_legend_stands_below_the_pictures_in_its_own_size() -> None:
    legend = Image.new("RGB", (50, 10), "blue")
    picture = Image.new("RGB", (32, 32), "red")
    page = draw_page([GridBlock(title="t", pictures=[picture], captions=["c"], legend=legend)])
    assert _area(page, (0, 0, 255)) == 50 * 10
    lowest_red = np.argwhere((np.asarray(page) == (255, 0, 0)).all(axis=2)).max(axis=0)[0]
    highest_blue = np.argwhere((np.asarray(page) == (0, 0, 255)).all(axis=2)).min(axis=0)[0]
    assert lowest_red < highest_blue


def test_one_page_is_as_high_as_it_must_be() -> None:
    assert draw_page([_block(side=1000)] * 10).height > 10_000


def test_large_pictures_keep_their_size() -> None:
    (page,) = draw_grids([_block(side=300)])
    assert _area(page, (255, 0, 0)) == 300 * 300


def test_every_picture_is_drawn_whole_in_a_square_of_lines() -> None:
    (page,) = draw_grids([_block(n_pictures=5, captions=("0.1", "0.2", "0.3", "0.4", "0.5"))])
    assert [_area(page, (255, 10 * i, 0)) for i in range(5)] == [128 * 128] * 5
    columns = [np.argwhere((np.asarray(page) == (255, 10 * i, 0)).all(axis=2)).min(axis=0)[1] for i in range(5)]
    assert columns[0] == columns[3] < columns[1] == columns[4] < columns[2]


def test_page_is_at_most_8_pictures_wide() -> None:
    (page,) = draw_grids([_block(n_pictures=90)])
    assert page.width < 9 * 136


def test_blocks_stand_below_one_another_and_break_into_pages() -> None:
    assert len(list(draw_grids([_block()] * 3))) == 1
    pages = list(draw_grids([_block(side=1000)] * 10))
    assert len(pages) == 2
    assert sum(_area(page, (255, 0, 0)) for page in pages) == 10 * 1000 * 1000


def test_block_higher_than_a_page_gets_its_own() -> None:
    assert len(list(draw_grids([_block(), _block(n_pictures=500), _block()]))) == 3


@pytest.mark.parametrize(
    "title", ["", "日本のドラゴン 🐉", "العربية", "a\nb\tc\0d", "\u200d\ufe0f", "word " * 300, "x" * 2000]
)
def test_any_title_can_be_drawn(title: str) -> None:
    (page,) = draw_grids([_block(title=title)])
    assert page.width == 384


def test_wrapped_lines_fit_and_lose_no_letter() -> None:
    font = ImageFont.load_default(16)
    text = "a small red circle above " + "w" * 200 + " and the end"
    lines = wrap(text, font, 150)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_font_without_freetype_draws_what_it_can() -> None:
    assert drawable("naïve 日本", ImageFont.load_default_imagefont()) == "naïve ??"
