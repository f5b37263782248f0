"""Numbers against how many candidates the best is of, as a picture: the paper's figure 9(c)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from PIL import Image

from dalle1.evaluation.pictures import picture_of

# What is drawn, if it was measured, and how it is called.
_PANELS = {
    "fid": "FID",
    "inception_score": "inception score",
    "clip_score": "CLIP score",
    "prompt_accuracy": "prompts that are right",
}


def draw_best_of(numbers: Mapping[int, Mapping[str, float]]) -> Image.Image:
    """A plot for each number, with a line for each extractor; `numbers` has those of each count of candidates."""
    import matplotlib.figure

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for n, values in sorted(numbers.items()):
        for name, value in values.items():
            metric, _, rest = name.partition("[")
            extractor = re.split(r"[,\]]", rest)[0]
            if metric in _PANELS:
                lines.setdefault(metric, {}).setdefault(extractor, []).append((n, value))
    metrics = [metric for metric in _PANELS if metric in lines]
    figure = matplotlib.figure.Figure(figsize=(3.4 * len(metrics), 3), dpi=90, layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for extractor, points in lines[metric].items():
            axes.plot(*zip(*points, strict=True), label=extractor, marker=".")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="candidates, of which the best is taken")
        axes.set_title(_PANELS[metric], fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    return picture_of(figure)
