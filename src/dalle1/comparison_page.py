"""The page that shows runs side by side: sortable tables, and their curves one over the other."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from dalle1.html_page import for_json, render_page
from dalle1.run_records import option_text

Curve = Sequence[tuple[int, float]]
# Of a chart, in units of its view box; the margins hold the numbers.
_WIDTH, _HEIGHT = 720.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 12.0, 10.0, 26.0
_STROKE = 5.0
# So many points of a curve are drawn, more than a chart has columns of pixels to tell apart; extremes stay.
_MOST_POINTS = 400
# Steps of the golden angle: hues of neighbours in the list are far from each other, for any number of runs.
_HUE_STEP = 0.381966
# With the hue a second mark, by which runs are told apart without colours: repeats after as many runs.
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
# Values further than so many spreads beyond the middle nine tenths are outside the chart: one run that diverges
# would make lines of all others.
_FENCE = 1.5


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run in a chart."""

    number: int  # of the run in its group
    points: str  # of an SVG polyline


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One quantity of several runs over their updates."""

    metric: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]  # place and number
    y_ticks: list[tuple[float, str]]
    n_outside: int  # points beyond the chart


def render_comparison(comparison: Mapping[str, Any], curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """A page that works from disk and loads nothing.

    Args:
        comparison: What `compare.compare` gives, without numbers that are not finite.
        curves: Directory of each run -> quantity -> its values by update.
    """
    comparison = for_json(comparison)
    groups = []
    for index, group in enumerate(comparison["stages"]):
        runs = group["runs"]
        of_runs = [curves[run["directory"]] for run in runs]
        charts = [draw_chart(metric, [each.get(metric, ()) for each in of_runs]) for metric in group["metrics"]]
        groups.append(group | {"charts": charts, "index": index})
    n_runs = sum(len(group["runs"]) for group in groups)
    return render_page(
        "comparison.html",
        title=f"{n_runs} run{'' if n_runs == 1 else 's'}",
        directory=comparison["directory"],
        created=f"{datetime.fromisoformat(comparison['created']):%Y-%m-%d %H:%M %Z}",
        groups=groups,
        option_text=option_text,
        styles=[style_of(number) for number in range(max((len(group["runs"]) for group in groups), default=0))],
        size={"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM},
    )


def style_of(number: int) -> dict[str, str]:
    """Colour and dashes by which a run is told apart; the first runs differ most."""
    # Of middle lightness, so that they show on a light and on a dark page.
    red, green, blue = colorsys.hls_to_rgb((0.6 + number * _HUE_STEP) % 1, 0.5, 0.65)
    color = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    return {"color": color, "dashes": _DASHES[number % len(_DASHES)]}


def draw_chart(metric: str, curves: Sequence[Curve]) -> Chart:
    """A chart of runs' curves, of which some may be empty, but not all.

    Raises: ValueError if all are empty.
    """
    values = np.array([value for curve in curves for _, value in curve])
    if not len(values):
        raise ValueError(f"a chart needs at least one value, {metric} has none")
    last = max(step for curve in curves for step, _ in curve)
    x_ticks = _ticks(0, max(last, 1))
    y_ticks = _ticks(*_visible_range(values))
    x_range, y_range = (0.0, float(max(last, 1))), (y_ticks[0], y_ticks[-1])
    return Chart(
        metric=metric,
        lines=[
            Line(number=number, points=_points(thin(curve), x_range, y_range))
            for number, curve in enumerate(curves)
            if curve
        ],
        x_ticks=[(round(_x(tick, x_range), 1), _label(tick)) for tick in x_ticks if tick <= x_range[1]],
        y_ticks=[(round(_y(tick, y_range), 1), _label(tick)) for tick in y_ticks],
        n_outside=int(((values < y_range[0]) | (values > y_range[1])).sum()),
    )


def _visible_range(values: np.ndarray) -> tuple[float, float]:
    low, high = (float(value) for value in np.quantile(values, (0.05, 0.95)))
    fence = _FENCE * (high - low)
    low, high = max(float(values.min()), low - fence), min(float(values.max()), high + fence)
    return (low, high) if high > low else (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from one at or below `low` to one at or above `high`."""
    return [float(tick) for tick in MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def thin(curve: Curve) -> Curve:
    """A curve with fewer points: of each of equal parts the least and the greatest value, in their order."""
    if len(curve) <= _MOST_POINTS:
        return curve
    kept = {0, len(curve) - 1}
    edges = np.linspace(0, len(curve), _MOST_POINTS // 2 + 1).astype(int).tolist()
    for start, stop in pairwise(edges):
        kept |= {min(range(start, stop), key=lambda i: curve[i][1]), max(range(start, stop), key=lambda i: curve[i][1])}
    return [curve[i] for i in sorted(kept)]


def _x(step: float, x_range: tuple[float, float]) -> float:
    return _LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, y_range: tuple[float, float]) -> float:
    share = (value - y_range[0]) / (y_range[1] - y_range[0])
    # What is outside ends just beyond the edge, where it is cut off: browsers take no numbers of any size.
    return _HEIGHT - _BOTTOM - min(2.0, max(-1.0, share)) * (_HEIGHT - _TOP - _BOTTOM)


def _points(curve: Curve, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    assert all(math.isfinite(value) for _, value in curve), "run_records leaves out what is not"
    places = [(_x(step, x_range), _y(value, y_range)) for step, value in curve]
    if len(places) == 1:  # one value is no line: a short stroke shows where it is
        ((x, y),) = places
        places = [(x - _STROKE, y), (x + _STROKE, y)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
