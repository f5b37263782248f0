"""Pictures for people: of tensors, of tokens, of code use, of curves; to PNG files."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dalle1.atomic_files import atomic

# Steps of a sequence that fills the cube evenly (powers of 1 / g with g^4 = g + 1, Roberts 2018).
_COLOR_STEPS = (0.8191725134, 0.6710436067, 0.5497004779)


def to_uint8(image: Float[Tensor, "b 3 h w"]) -> np.ndarray:
    """Pictures in [0, 1] as uint8 (b, h, w, 3)."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


def to_pictures(image: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pictures in [0, 1] as Pillow's."""
    return [Image.fromarray(pixels) for pixels in to_uint8(image)]


def token_maps(image_tokens: Int[Tensor, "b gh gw"], *, pixels_per_token: int) -> list[Image.Image]:
    """Each token a square in a colour that depends on its id alone: equal ids look equal, in any picture and run."""
    ids = image_tokens.cpu().numpy()[..., None]
    # 1 + id, because the sequence starts in a corner.
    color = (40 + 215 * np.modf((1 + ids) * np.array(_COLOR_STEPS))[0]).astype(np.uint8)
    squares = color.repeat(pixels_per_token, axis=1).repeat(pixels_per_token, axis=2)
    return [Image.fromarray(picture) for picture in squares]


def draw_code_use(counts: Int[Tensor, " vocab_size"], title: str) -> Image.Image:
    """Codes by how often they occur, most frequent first, on a logarithmic scale; dead codes are the gap at the end."""
    import matplotlib.figure

    sorted_counts = counts.sort(descending=True).values.numpy()
    figure = matplotlib.figure.Figure(figsize=(6, 3.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(sorted_counts, fill=True, baseline=0.5)
    axes.set_yscale("log")
    axes.set(xlim=(0, len(counts)), ylim=(0.5, None), xlabel="codes, most frequent first", ylabel="times used")
    axes.set_title(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


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
    last_step = max(points[-1][0] for points in curves.values())
    columns = 4
    rows = -(-len(names) // columns)
    figure = matplotlib.figure.Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    for position, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, position + 1)
        # Validation with points, because there may be only one.
        for split, color, marker in (("train", "C0", ""), ("val", "C1", "."), ("perf", "C2", "")):
            points = curves.get(f"{split}/{name}")
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=split, color=color, linewidth=1, marker=marker)
        axes.set_xlim(0, last_step * 1.02)
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
