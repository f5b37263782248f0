"""What a person looks at of a survey: histograms, and pages of samples with their captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dalle1.atomic_files import atomic
from dalle1.data.captions import CaptionSource
from dalle1.data.raw_sample import TOKENS, BadSampleError, RawSample
from dalle1.data.survey import NO_PICTURE, Survey, SurveyOptions
from dalle1.data.survey_report import Find, distributions
from dalle1.data.tallies import Distribution, Mention
from dalle1.data.transforms import decode_image
from dalle1.evaluation.pictures import token_maps
from dalle1.picture_grid import Font, GridBlock, wrap

_SIDE = 200  # pixels of the square that a picture is shown in
_CARD_HEIGHT = _SIDE + 90
_COLUMNS = 6
_BINS = 48
_CAPTION_LINES, _LINE_HEIGHT = 4, 14  # lines, pixels
_LONGEST_TEXT = 400  # characters of a caption or sentence that may be drawn
_PAPER, _INK, _PALE_INK, _ALARM = (244, 244, 244), (32, 32, 32), (120, 120, 120), (176, 32, 32)


def save_histograms(survey: Survey, options: SurveyOptions, path: Path) -> None:
    """Draw how sizes or captions are distributed, of which there must be some, and where filters cut; writes a PNG."""
    import matplotlib.figure

    measured = {name: distribution for name, (distribution, _) in distributions(survey).items() if distribution.n}
    columns = min(3, len(measured))
    rows = -(-len(measured) // columns)
    figure = matplotlib.figure.Figure(figsize=(4.6 * columns, 3 * rows), layout="constrained")
    for position, (name, distribution) in enumerate(measured.items(), 1):
        axes = figure.add_subplot(rows, columns, position)
        edges = _edges(distribution)
        *counts, above = distribution.count(edges)
        is_whole = isinstance(distribution.least, int)
        # A whole number has its bar in the middle, and limits are beside it.
        axes.stairs(counts, [edge - 0.5 * is_whole for edge in edges], fill=True)
        if distribution.is_one_number:
            axes.set_xlim(0.8 * distribution.least, 1.2 * distribution.least)
        axes.set_title(f"{name}{f'; {above:,} above' if above else ''}", fontsize=9)
        axes.set_ylabel("captions" if name.startswith("caption") else "pictures", fontsize=8)
        axes.tick_params(labelsize=7)
        for label, limit in _limits(name, options).items():
            color = "C3" if label.startswith(("min", "max")) else "0.4"
            side = (0.5 if label.startswith("max") else -0.5) * is_whole
            axes.axvline(limit + side, color=color, linestyle="--", linewidth=1, label=f"{label} {limit:g}")
            axes.legend(fontsize=7, frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _edges(distribution: Distribution) -> list[float]:
    """Of equal bins without the few largest numbers; whole numbers are not split."""
    low, high = distribution.lowest_edge, distribution.percentile(99.5)
    if isinstance(distribution.least, int):
        width = max(1, math.ceil((high - low + 1) / _BINS))
        return [low + width * number for number in range(math.ceil((high - low + 1) / width) + 1)]
    # A little more, so that the highest number has a bin.
    return np.linspace(low, high * 1.01, 2 if distribution.is_one_number else _BINS + 1).tolist()


def _limits(name: str, options: SurveyOptions) -> dict[str, float]:
    """What filters allow, by their names."""
    filters = options.filters
    limits: dict[str, float | None] = {}
    if name.startswith("short side"):
        limits = {"image_size": options.image_size, "min_side": filters.min_side}
    elif name.startswith("aspect"):
        limits = {"max_aspect": filters.max_aspect}
    elif name.startswith("caption"):
        unit = "words" if "words" in name else "characters"
        limits = {f"{end}_caption_{unit}": getattr(filters, f"{end}_caption_{unit}") for end in ("min", "max")}
    return {label: limit for label, limit in limits.items() if limit is not None}


def block_of_samples(survey: Survey, options: SurveyOptions, find: Find | None) -> GridBlock | None:
    """The samples that were drawn, in their order; None if there are none."""
    if not survey.shown:
        return None
    cards = [_draw_card(_raw(mention, find), options.caption, mention.note) for mention in survey.shown]
    title = f"{len(cards)} of {survey.n_samples:,} samples, drawn at random with seed {options.seed}"
    return GridBlock(title=title, pictures=_as_high(cards), columns=_COLUMNS)


def blocks_of_dropped(survey: Survey, options: SurveyOptions, find: Find | None) -> Iterator[GridBlock]:
    """Some samples of each reason for which filters drop them."""
    for reason, n_dropped in survey.dropped.counts.most_common():
        cards = []
        for mention in survey.dropped.of(reason):
            note = ""
            if mention.like is not None and find is not None:
                note = "like the one before"
                cards.append(_draw_card(find(mention.like), options.caption, ""))
            cards.append(_draw_card(_raw(mention, find), options.caption, note))
        if cards:
            title = f"{reason}: {n_dropped:,} of {survey.n_samples:,} samples"
            yield GridBlock(title=title, pictures=_as_high(cards), columns=_COLUMNS)


def _raw(mention: Mention, find: Find | None) -> RawSample:
    if mention.raw is not None:
        return mention.raw
    assert find is not None, "samples that cannot be found are kept"
    return find(mention.number)


class _Card(NamedTuple):
    picture: Image.Image
    used: int  # pixels of its height


def _as_high(cards: Sequence[_Card]) -> list[Image.Image]:
    """All as high as the one that says the most."""
    height = max(card.used for card in cards)
    return [card.picture.crop((0, 0, _SIDE, height)) for card in cards]


def _draw_card(raw: RawSample, caption: CaptionSource, note: str) -> _Card:
    """A picture with what is said of it below, or why there is none in its place."""
    card = Image.new("RGB", (_SIDE, _CARD_HEIGHT), "white")
    pen, font = ImageDraw.Draw(card), _font()
    pen.rectangle((0, 0, _SIDE - 1, _SIDE - 1), _PAPER)
    facts = raw.key
    try:
        picture, size = _picture(raw)
    except ValueError as error:
        _write(pen, (8, 8), str(error), font, _ALARM, _SIDE // _LINE_HEIGHT - 1)
    else:
        facts = f"{size}, {raw.key}"
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
        card.paste(picture, ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2))
    try:
        text, ink = caption.read(raw)[0], _INK
    except BadSampleError as error:
        text, ink = error.kind, _PALE_INK
    top = _write(pen, (0, _SIDE + 3), text, font, ink, _CAPTION_LINES)
    top = _write(pen, (0, top), facts, font, _PALE_INK, 1)
    return _Card(card, _write(pen, (0, top), note, font, _ALARM, 1))


def _picture(raw: RawSample) -> tuple[Image.Image, str]:
    """A sample's picture, or a map of the tokens that stand for it, and its size. Raises: ValueError if it has none."""
    try:
        data = raw.image()
    except BadSampleError as error:
        if error.kind != NO_PICTURE or raw.part(TOKENS) is None:
            raise
    else:
        picture = decode_image(data)
        return picture, f"{picture.width} x {picture.height}"
    crops = raw.image_tokens()
    n_crops, rows, columns = crops.shape
    first = torch.from_numpy(crops[:1].astype(np.int64))
    (token_map,) = token_maps(first, pixels_per_token=max(1, _SIDE // max(rows, columns)))
    return token_map, f"{n_crops} x {rows} x {columns} tokens"


@cache
def _font() -> Font:
    """Matplotlib's, which has more letters than Pillow's: European, Cyrillic, Greek, Arabic, not Chinese."""
    import matplotlib

    try:
        return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 10)
    except (OSError, ImportError):  # it is not there, or Pillow is without FreeType
        return ImageFont.load_default(11)


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: Font, ink: tuple[int, int, int], most_lines: int
) -> int:
    """Write the beginning of a text in lines as long as they may be, and return where the next line would be."""
    left, top = place
    width = _SIDE - 2 * left
    lines = wrap(text[:_LONGEST_TEXT], font, width)
    if len(lines) > most_lines:
        lines = lines[:most_lines]
        while lines[-1] and font.getlength(f"{lines[-1]} ...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " ..."
    for line in lines:
        pen.text((left, top), line, ink, font)
        top += _LINE_HEIGHT
    return top
