"""Pictures for people: of tensors, of tokens, of numbers, of code use, of curves; to PNG files."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle1.atomic_files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def heat_map(values: Float[Tensor, "gh gw"], *, highest: float, pixels_per_value: int) -> Image.Image:
    """Each value a square: dark at 0, bright at `highest` > 0 and above it."""
    squares = _heat_colors(values.cpu().numpy() / highest)
    return Image.fromarray(squares.repeat(pixels_per_value, axis=0).repeat(pixels_per_value, axis=1))


def heat_legend(low: str, high: str, *, width: int) -> Image.Image:
    """The colours of `heat_map` from 0 to `highest`, with words for both ends below them; `width` in pixels."""
    font = ImageFont.load_default(12)
    bar_height, text_height = 12, int(font.getbbox("Ag")[3]) + 4
    legend = Image.new("RGB", (width, bar_height + text_height), "white")
    bar = _heat_colors(np.linspace(0, 1, width)[None].repeat(bar_height, axis=0))
    legend.paste(Image.fromarray(bar), (0, 0))
    pen = ImageDraw.Draw(legend)
    pen.text((0, bar_height + 1), low, (96, 96, 96), font)
    pen.text((width - font.getlength(high), bar_height + 1), high, (96, 96, 96), font)
    return legend


def _heat_colors(shares: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) of numbers (h, w), clipped to [0, 1]."""
    import matplotlib

    colors: np.ndarray = matplotlib.colormaps["inferno"](shares.clip(0, 1), bytes=True)[..., :3]
    return np.ascontiguousarray(colors)


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
    return picture_of(figure)


def picture_of(figure: Figure) -> Image.Image:
    """A figure of matplotlib as a picture, at its own resolution."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


_LONG_TEXT = 500  # characters; from there on it is compressed


def save_picture(picture: Image.Image, path: Path, *, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG that is either whole or absent, with texts that travel in it; makes the directory."""
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value, zip=len(value) > _LONG_TEXT)
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def save_curves(run_dir: Path, path: Path) -> None:
    """Draw every logged quantity of a run over its steps, training and validation in one plot each; writes a PNG."""
    import matplotlib.figure

    curves = read_curves(run_dir)
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
        axes.legend(fontsize=7, frameon=False, loc="upper right")  # the best place takes a long run a long time
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of each quantity that a run has logged, by step.

    Of the files that Lightning's CSVLogger writes, one for every start of the run; the later one holds."""
    starts = run_dir.glob("logs/version_*/metrics.csv")
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for metrics_csv in sorted(starts, key=lambda path: int(path.parent.name.removeprefix("version_"))):
        with open(metrics_csv, newline="") as file:
            for row in csv.DictReader(file):
                # A process that was killed may have cut its last line.
                if None in row.values():
                    continue
                for name, value in row.items():
                    if "/" in name and value:
                        curves[name][int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}
