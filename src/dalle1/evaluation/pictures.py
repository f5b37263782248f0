"""Pictures for people: tensors to PNG files, grids, curves."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle1.atomic_files import atomic

# Small pictures are enlarged to about this many pixels a side, by whole factors, so that they can be looked at.
_COMFORTABLE_SIDE = 128


def to_pixels(image: Float[Tensor, "b 3 h w"]) -> np.ndarray:
    """Pictures in [0, 1] as uint8 (b, h, w, 3)."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


def image_grid(image: Float[Tensor, "b 3 h w"], *, columns: int, gap: int = 2) -> Image.Image:
    """Pictures in rows of `columns`, `gap` pixels apart on white; small ones enlarged without smoothing."""
    rows = -(-len(image) // columns)
    missing = rows * columns - len(image)
    image = torch.cat([image, image.new_ones(missing, *image.shape[1:])])
    scale = max(1, _COMFORTABLE_SIDE // image.shape[-1])
    image = image.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    image = torch.nn.functional.pad(image, (0, gap, 0, gap), value=1.0)
    grid = rearrange(image, "(r c) d h w -> 1 d (r h) (c w)", r=rows)
    return Image.fromarray(to_pixels(grid[..., :-gap, :-gap])[0])


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG that is either whole or absent; makes the directory."""
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")


def save_curves(metrics_csvs: Sequence[Path], path: Path) -> None:
    """Draw every logged quantity of a run over its steps, training and validation in one plot each.

    Reads the files that Lightning's CSVLogger writes, one for every start of the run; writes a PNG."""
    import matplotlib.figure

    curves = _read_curves(metrics_csvs)
    names = sorted({name.partition("/")[2] for name in curves})
    columns = 3
    rows = -(-len(names) // columns)
    figure = matplotlib.figure.Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    for position, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, position + 1)
        for split in ("train", "val"):
            points = curves.get(f"{split}/{name}")
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=split, linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def _read_curves(metrics_csvs: Sequence[Path]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of each quantity by step; where a run was resumed, the later file holds."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for metrics_csv in metrics_csvs:
        with open(metrics_csv, newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if "/" in name and value:
                        curves[name][int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}
