"""The page on which pairs of near pictures are looked at, to choose from which similarity on they are the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dalle1.data.raw_sample import CAPTION, BadSampleError, RawSample
from dalle1.data.transforms import decode_image
from dalle1.html_page import embed, render_page

_THUMBNAIL_SIDE = 160  # pixels of the longer side
_STEPS = 1000  # of the slider between two cosines that differ by 1
_LONGEST_CAPTION = 300  # characters


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A validation picture, and the training picture that is nearest to it; of two things the first is validation's."""

    place: int  # among all pairs, the closest first, from 0
    similarity: float
    pictures: tuple[dict[str, Any], ...]  # as `html_page.embed` gives them
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    containers: tuple[str, ...]


def render_overlap(pairs: Sequence[Pair], similarities: np.ndarray, *, threshold: float, extractor: str) -> str:
    """A page that works from disk and loads nothing: pairs by closeness, and a slider for the threshold.

    Args:
        pairs: Those that are shown, by closeness.
        similarities: Of all pairs, float64 (n,) in descending order.
        threshold: Where the slider stands at first.
        extractor: Whose features were compared.
    """
    lowest = math.floor(min(float(similarities[-1]), threshold) * _STEPS)
    return render_page(
        "overlap.html",
        extractor=extractor,
        n=len(similarities),
        pairs=pairs,
        threshold=threshold,
        slider={"lowest": lowest, "highest": _STEPS, "step": 1, "at": math.floor(threshold * _STEPS + 0.5)},
        data={
            "steps": _STEPS,
            "lowest": lowest,
            "counts": counts_at_or_above(similarities, lowest, _STEPS),
            "n": len(similarities),
        },
    )


def counts_at_or_above(similarities: np.ndarray, lowest: int, steps: int) -> list[int]:
    """How many similarities, in descending order, are at least k / steps, for k = lowest ... steps."""
    thresholds = np.arange(lowest, steps + 1) / steps
    return [int(count) for count in len(similarities) - np.searchsorted(similarities[::-1], thresholds, side="left")]


def thumbnail(sample: RawSample) -> dict[str, Any]:
    """A sample's picture, small.

    Raises: ValueError if it cannot be decoded any more.
    """
    picture = decode_image(sample.image())
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
    return embed(picture)


def caption_of(sample: RawSample) -> str:
    """A sample's caption as the page shows it; empty if it has none that can be read."""
    try:
        text = sample.text() if sample.part(CAPTION) is not None else ""
    except BadSampleError:
        return ""
    return text if len(text) <= _LONGEST_CAPTION else f"{text[: _LONGEST_CAPTION - 1]}…"
