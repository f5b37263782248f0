"""Pages of small pictures with captions, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_SMALLEST_SIDE = 128  # smaller pictures are enlarged by a whole factor to at least this many pixels,
_LARGEST_SIDE = 1024  # but not if their longer side would exceed this
_MOST_COLUMNS = 8
_NARROWEST_PAGE = 384
_HIGHEST_PAGE = 8000  # pixels; what does not fit goes on a further page
_GAP = 8
_BACKGROUND, _TITLE_INK, _CAPTION_INK = "white", "black", (96, 96, 96)


@dataclass(frozen=True, kw_only=True)
class GridBlock:
    """Pictures of one size under a title; `captions` has one text per picture, or is empty."""

    title: str
    pictures: Sequence[Image.Image]
    captions: Sequence[str] = ()
    columns: int | None = None  # pictures in a line; by default about as many as lines, at most 8
    legend: Image.Image | None = None  # drawn below the pictures in its own size


def draw_grids(blocks: Iterable[GridBlock]) -> Iterator[Image.Image]:
    """Pages with all blocks below one another, one at a time; a block higher than a page gets one of its own."""
    page: list[Image.Image] = []
    for block in map(_draw_block, blocks):
        if page and sum(each.height for each in page) + block.height > _HIGHEST_PAGE:
            yield _stack(page)
            page = []
        page.append(block)
    if page:
        yield _stack(page)


def draw_page(blocks: Sequence[GridBlock]) -> Image.Image:
    """One page with all blocks below one another, however high."""
    return _stack([_draw_block(block) for block in blocks])


def _stack(blocks: Sequence[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (max(block.width for block in blocks), sum(block.height for block in blocks)), _BACKGROUND)
    top = 0
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
    return page


def _draw_block(content: GridBlock) -> Image.Image:
    """The title, and below it the pictures in lines of equal length."""
    pictures = content.pictures
    title_font, caption_font = ImageFont.load_default(16), ImageFont.load_default(12)
    factor = max(1, min(math.ceil(_SMALLEST_SIDE / min(pictures[0].size)), _LARGEST_SIDE // max(pictures[0].size)))
    cell_width, cell_height = pictures[0].width * factor, pictures[0].height * factor
    columns = content.columns or min(math.ceil(math.sqrt(len(pictures))), _MOST_COLUMNS)
    width = max(columns * (cell_width + _GAP) + _GAP, _NARROWEST_PAGE)
    lines = wrap(content.title, title_font, width - 2 * _GAP)
    title_height, caption_height = _line_height(title_font), _line_height(caption_font) if content.captions else 0
    top = 2 * _GAP + title_height * len(lines)
    pitch = cell_height + caption_height + _GAP
    bottom = top + pitch * math.ceil(len(pictures) / columns)
    legend_height = content.legend.height + _GAP if content.legend else 0
    block = Image.new("RGB", (width, bottom + legend_height), _BACKGROUND)
    if content.legend:
        block.paste(content.legend, (_GAP, bottom))
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        pen.text((_GAP, _GAP + number * title_height), line, _TITLE_INK, title_font)
    for number, picture in enumerate(pictures):
        x, y = _GAP + number % columns * (cell_width + _GAP), top + number // columns * pitch
        block.paste(picture.resize((cell_width, cell_height), Image.Resampling.NEAREST), (x, y))
        if content.captions:
            pen.text((x, y + cell_height), content.captions[number], _CAPTION_INK, caption_font)
    return block


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of a text that are at most `width` pixels wide; only words wider than that are broken."""
    lines = [""]
    for word in drawable(text, font).split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def drawable(text: str, font: Font) -> str:
    """The text with everything that the font cannot draw as `?`, and control characters as spaces."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if isinstance(font, ImageFont.FreeTypeFont):
        return text  # draws a box for a glyph that it lacks
    # Pillow's font without FreeType knows Latin-1 and raises for all else.
    return text.encode("latin-1", "replace").decode("latin-1")


def _line_height(font: Font) -> int:
    return math.ceil(font.getbbox("Ag")[3]) + 4
