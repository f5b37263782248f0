"""Where in pictures and captions a transformer is sure, as pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dalle1.evaluation.pictures import picture_of
from dalle1.evaluation.transformer_likelihood import PositionNumbers


def draw_image_positions(positions: PositionNumbers) -> Image.Image:
    """Heat maps of the image tokens' mean nats and of what the caption saves, and their means by row.

    The upper end of the first map's colours is the largest value: the numbers beside it say what that is.
    """
    import matplotlib.figure

    maps = {"nats of image tokens": positions.image_nats}
    if positions.caption_gain is not None:
        maps["saved by the caption"] = positions.caption_gain
    figure = matplotlib.figure.Figure(figsize=(3.6 * (len(maps) + 1), 3.2), dpi=100, layout="constrained")
    *panels, rows = figure.subplots(1, len(maps) + 1)
    for axes, (title, values) in zip(panels, maps.items(), strict=True):
        shown = axes.imshow(values.numpy(), cmap="inferno", vmin=min(0.0, float(values.min())))
        axes.set(xlabel="column", ylabel="row")
        axes.locator_params(integer=True)
        axes.set_title(title, fontsize=9)
        figure.colorbar(shown, ax=axes, shrink=0.8)
    for title, values in maps.items():
        rows.plot(values.mean(1).numpy(), range(len(values)), marker=".", label=title)
    rows.invert_yaxis()
    rows.set(xlabel="mean nats per token", ylabel="row")
    rows.set_title("by row", fontsize=9)
    rows.yaxis.get_major_locator().set_params(integer=True)
    rows.grid(alpha=0.3)
    rows.legend(fontsize=7, frameon=False)
    return picture_of(figure)


def draw_text_positions(positions: PositionNumbers) -> Image.Image:
    """Mean nats and accuracy of text tokens over positions, and how many captions have a token there."""
    import matplotlib.figure

    n_text = positions.n_text.numpy()
    last = int(np.flatnonzero(n_text).max()) + 1
    figure = matplotlib.figure.Figure(figsize=(7, 4.2), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(positions.text_nats.numpy()[:last], marker=".", label="nats")
    above.set(ylabel="nats of text tokens", ylim=(0, None))
    above.grid(alpha=0.3)
    accuracy = above.twinx()
    accuracy.plot(positions.text_accuracy.numpy()[:last], color="C1", marker=".", label="accuracy")
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    above.legend(handles=[*above.lines, *accuracy.lines], fontsize=8, frameon=False)
    below.stairs(n_text[:last] / n_text[0], np.arange(last + 1) - 0.5, fill=True)
    below.set(xlabel="position in the caption; its end is a token too", ylabel="captions as long", ylim=(0, 1.05))
    below.set_xlim(-0.5, last - 0.5)
    below.xaxis.get_major_locator().set_params(integer=True)
    return picture_of(figure)
