"""The page on which pairs of near pictures are looked at, to choose from which similarity on they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from dalle1.data.raw_sample import CAPTION, BadSampleError, RawSample
from dalle1.data.transforms import decode_image
from dalle1.html_page import embed, render_page

_THUMBNAIL_SIDE = 160  # pixels of the longer side
# Places of the slider at most. They are cosines that occur, at even shares of the pairs: features of some networks
# differ in the fourth digit alone.
_MOST_STEPS = 1000
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
    thresholds = slider_steps(similarities, threshold)
    return render_page(
        "overlap.html",
        extractor=extractor,
        n=len(similarities),
        pairs=pairs,
        slider={"highest": len(thresholds) - 1, "at": thresholds.index(threshold)},
        data={
            "thresholds": thresholds,
            "counts": counts_at_or_above(similarities, thresholds),
            "n": len(similarities),
        },
    )


def slider_steps(similarities: np.ndarray, threshold: float) -> list[float]:
    """Thresholds to choose from, ascending: similarities (descending) at even shares of them, and `threshold`."""
    places = np.linspace(0, len(similarities) - 1, min(len(similarities), _MOST_STEPS)).round().astype(int)
    return sorted({threshold, *similarities[places].tolist()})


def counts_at_or_above(similarities: np.ndarray, thresholds: Sequence[float]) -> list[int]:
    """How many similarities, in descending order, are at least as large as each threshold."""
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
