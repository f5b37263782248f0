"""Pictures for people: token maps, code use, curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle1.evaluation.pictures import draw_code_use, heat_legend, heat_map, save_curves, to_pictures, token_maps


def test_pictures_of_tensors_are_rounded_and_clamped() -> None:
    image = torch.tensor([-1.0, 0.5, 2.0])[:, None, None].expand(3, 2, 4)[None]
    (picture,) = to_pictures(image)
    assert picture.size == (4, 2)
    assert picture.getpixel((3, 1)) == (0, 128, 255)


def test_token_map_has_a_square_for_each_token() -> None:
    tokens = torch.tensor([[[0, 1, 2], [3, 4, 0]]])
    (picture,) = token_maps(tokens, pixels_per_token=4)
    pixels = np.asarray(picture)
    assert pixels.shape == (8, 12, 3)
    for row in range(2):
        for col in range(3):
            square = pixels[4 * row : 4 * row + 4, 4 * col : 4 * col + 4].reshape(-1, 3)
            assert len(np.unique(square, axis=0)) == 1
    assert (pixels[0, 0] == pixels[7, 11]).all(), "equal ids look equal"


def test_colors_of_all_ids_of_a_large_codebook_are_bright_and_nearly_all_different() -> None:
    (picture,) = token_maps(torch.arange(8192).reshape(1, 64, 128), pixels_per_token=1)
    colors = np.asarray(picture).reshape(-1, 3)
    assert colors.min() >= 40
    assert len(np.unique(colors, axis=0)) > 8150
    # Neighbouring ids are far apart: of 255 levels at least 60 in some colour.
    assert np.abs(np.diff(colors.astype(int), axis=0)).max(axis=1).min() >= 60


def test_heat_map_has_a_square_for_each_value_and_is_brighter_for_higher_ones() -> None:
    pixels = np.asarray(heat_map(torch.tensor([[0.0, 1, 2], [3, 4, 5]]), highest=4, pixels_per_value=3))
    assert pixels.shape == (6, 9, 3)
    squares = pixels.reshape(2, 3, 3, 3, 3).swapaxes(1, 2)
    assert (squares == squares[:, :, :1, :1]).all()
    brightness = squares[:, :, 0, 0].astype(int).sum(axis=-1).flatten().tolist()
    assert brightness[:5] == sorted(set(brightness[:5])), "strictly brighter"
    assert (squares[1, 1] == squares[1, 2]).all(), "all above the highest looks like it"


def test_legend_goes_from_the_darkest_to_the_brightest() -> None:
    pixels = np.asarray(heat_legend("low", "high", width=200))
    ends = np.asarray(heat_map(torch.tensor([[0.0, 1]]), highest=1, pixels_per_value=1))[0]
    assert (pixels[0, [0, -1]] == ends).all()
    assert (pixels[14:] < 255).any(axis=(0, 2))[[*range(30), *range(170, 200)]].sum() > 20, "words at both ends"


def test_code_use_is_drawn_for_any_counts() -> None:
    for counts in ([5, 0, 100, 1], [0, 0, 7, 0]):
        assert draw_code_use(torch.tensor(counts), "a title").size == (600, 320)


def test_curves_of_all_starts_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    first = "epoch,step,train/loss,val/loss,val/ssim\n0,10,3.0,,\n0,20,2.0,2.5,0.5\n0,30,9,,\n"
    # Their order is that of their numbers.
    cut = "epoch,step,train/loss\n0,30,1.0\n0,4"  # by a kill: what stands there is not a step
    for version, text in ((9, first), (10, cut)):
        log = tmp_path / "logs" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text(text)

    save_curves(tmp_path, tmp_path / "curves.png")

    axes = {each.get_title(): each for each in figures[0].axes}
    assert set(axes) == {"loss", "ssim"}
    train, val = axes["loss"].lines
    assert train.get_xydata().tolist() == [[10, 3], [20, 2], [30, 1]], "the later start holds where both have a step"
    assert val.get_xydata().tolist() == [[20, 2.5]]
    assert axes["loss"].get_xlim() == axes["ssim"].get_xlim(), "curves can be compared"
    assert (tmp_path / "curves.png").stat().st_size > 0
