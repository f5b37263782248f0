"""Read a picture and a prompt of the shapes grammar; say for each attribute whether the picture has it.

Steps: estimate the background, split what differs from it into connected objects, explain each object by
the (shape, colour, radius) whose drawing is nearest to it, then compare with what the prompt says.
It shares the drawing code with the data set but never sees a scene: only pixels and words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from dalle1.data import shapes

# Order in which attributes are reported; `background` belongs to the picture, the others to its objects.
ATTRIBUTES = ("color", "shape", "size", "place", "relation", "count", "background")

# A pixel belongs to an object when it is this far from the background (RGB distance, 0..441): a third of
# the way to the least contrasting pair, purple on gray, so that faint noise is not an object.
_OBJECT_DISTANCE = 40.0
# Specks below this share of the picture are ignored: a tenth of the smallest object (a small star).
_SMALLEST_AREA = 0.0016
# Sizes are told apart at the geometric mean of the two radii.
_SIZE_LIMIT = float(np.sqrt(shapes.SIZES["small"] * shapes.SIZES["large"]))


@dataclass(frozen=True, kw_only=True)
class SeenObject:
    """One object found in a picture; `x`, `y`, `radius` are shares of the side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """All that was found in a picture."""

    background: str
    objects: tuple[SeenObject, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The verdict on one picture: per attribute that the prompt states, the share of its objects that have it."""

    attributes: Mapping[str, float]
    objects_right: tuple[bool, ...]

    @property
    def right(self) -> bool:
        """True if everything that the prompt says is in the picture, and nothing else is."""
        return all(value == 1.0 for value in self.attributes.values())


def see(picture: np.ndarray) -> Seen:
    """Objects and background of a picture, uint8 (side, side, 3).

    Raises: ValueError if the picture is not a square uint8 RGB array of at least 16 pixels."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture must be uint8 (side, side, 3), got {picture.dtype} {picture.shape}")
    if picture.shape[0] != picture.shape[1] or picture.shape[0] < 16:
        raise ValueError(f"picture must be square with a side >= 16, got {picture.shape[:2]}")
    pixels = picture.astype(np.float32)
    side = len(pixels)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = _nearest_color(ground, shapes.BACKGROUNDS)
    distance = np.linalg.norm(pixels - ground, axis=2)
    labels, count = ndimage.label(distance > _OBJECT_DISTANCE)
    objects = []
    for index in range(1, count + 1):
        region = labels == index
        if region.sum() >= _SMALLEST_AREA * side * side:
            objects.append(_explain(pixels, distance, region, ground))
    return Seen(background=background, objects=tuple(objects))


def score(picture: np.ndarray, prompt: str) -> Score:
    """Compare a picture, uint8 (side, side, 3), with a prompt of the shapes grammar.

    Raises: ValueError if the prompt is no sentence of the grammar, or as in `see`."""
    return _compare(see(picture), shapes.parse(prompt))


def summarize(scores: Sequence[Score]) -> dict[str, float]:
    """Share right over pictures, in [0, 1]: `prompt` (everything right), then each attribute that occurs.

    Raises: ValueError if there is no score."""
    if not scores:
        raise ValueError("need at least one score to summarize, got 0")
    summary = {"prompt": float(np.mean([item.right for item in scores]))}
    for name in ATTRIBUTES:
        values = [item.attributes[name] for item in scores if name in item.attributes]
        if values:
            summary[name] = float(np.mean(values))
    return summary


def _nearest_color(color: np.ndarray, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.sum((color - np.array(palette[name])) ** 2)))


@cache
def _unit_shape(shape: str) -> tuple[float, float]:
    """Area over radius^2, and how far the centroid lies below the centre over radius."""
    mask = shapes.coverage(shape, 128, 128, 100, 256)
    rows = np.arange(256) + 0.5
    return float(mask.sum()) / 100**2, float((mask.sum(axis=1) * rows).sum() / mask.sum() - 128) / 100


def _explain(pixels: np.ndarray, distance: np.ndarray, region: np.ndarray, ground: np.ndarray) -> SeenObject:
    """The drawing nearest to one connected region: its colour from the core, its shape and radius by comparison."""
    side = len(pixels)
    core = region & (distance >= np.quantile(distance[region], 0.5))
    fill = np.median(pixels[core], axis=0)
    # Share of the object's colour in each pixel: 0 on the background, 1 inside.
    contrast = fill - ground
    alpha = np.clip((pixels - ground) @ contrast / max(float(contrast @ contrast), 1.0), 0, 1)
    alpha = np.where(ndimage.binary_dilation(region, iterations=2), alpha, 0).astype(np.float32)
    area = max(float(alpha.sum()), 1.0)
    centers = np.arange(side) + 0.5
    x, y = float((alpha.sum(axis=0) * centers).sum() / area), float((alpha.sum(axis=1) * centers).sum() / area)
    best, best_error = None, float("inf")
    for shape in shapes.SHAPES:
        unit_area, sink = _unit_shape(shape)
        radius = float(np.sqrt(area / unit_area))
        center_y = y - sink * radius
        error = float(np.abs(shapes.coverage(shape, x, center_y, radius, side) - alpha).sum())
        if error < best_error:
            best, best_error = (shape, center_y, radius), error
    assert best is not None, "there is at least one shape"
    shape, center_y, radius = best
    return SeenObject(
        shape=shape,
        color=_nearest_color(fill, shapes.COLORS),
        size="small" if radius / side < _SIZE_LIMIT else "large",
        x=x / side,
        y=center_y / side,
        radius=radius / side,
    )


def _compare(seen: Seen, claim: shapes.Claim) -> Score:
    """Score of the assignment of seen to claimed objects that makes the most attributes right."""
    wanted = [thing for thing in claim.things for _ in range(thing.count)]
    # A missing object is one that has no attribute right; a surplus one is left over.
    found: list[SeenObject | None] = list(seen.objects[: 2 * len(wanted)])
    found += [None] * (len(wanted) - len(found))
    assignments = permutations(found, len(wanted))
    verdicts = max(
        ([_attributes_of(thing, item) for thing, item in zip(wanted, chosen, strict=True)] for chosen in assignments),
        key=lambda rows: sum(sum(row.values()) for row in rows),
    )
    attributes: dict[str, float] = {}
    for name in ATTRIBUTES:
        values = [row[name] for row in verdicts if name in row]
        if values:
            attributes[name] = float(np.mean(values))
    if claim.relation:
        attributes["relation"] = float(_relation_holds(seen, claim))
    attributes["count"] = float(len(seen.objects) == len(wanted))
    if claim.background:
        attributes["background"] = float(seen.background == claim.background)
    return Score(attributes=attributes, objects_right=tuple(all(row.values()) for row in verdicts))


def _attributes_of(thing: shapes.Thing, item: SeenObject | None) -> dict[str, bool]:
    """Which of one thing's stated attributes one seen object has."""
    row = {
        "color": item is not None and item.color == thing.color,
        "shape": item is not None and item.shape == thing.shape,
    }
    if thing.size:
        row["size"] = item is not None and item.size == thing.size
    if thing.place:
        row["place"] = item is not None and _place_of(item) == thing.place
    return row


def _place_of(item: SeenObject) -> str:
    return min(
        shapes.PLACES, key=lambda name: np.hypot(item.x - shapes.PLACES[name][0], item.y - shapes.PLACES[name][1])
    )


def _relation_holds(seen: Seen, claim: shapes.Claim) -> bool:
    """Whether an object like the first stands in the claimed relation to one like the second."""

    def matches(thing: shapes.Thing) -> list[SeenObject]:
        return [item for item in seen.objects if (item.color, item.shape) == (thing.color, thing.shape)]

    for first in matches(claim.things[0]):
        for second in matches(claim.things[1]):
            dx, dy = second.x - first.x, second.y - first.y
            vertical = abs(dy) > abs(dx)
            actual = ("above" if dy > 0 else "below") if vertical else ("left of" if dx > 0 else "right of")
            if first is not second and actual == claim.relation:
                return True
    return False
