"""The generated data set: captioned scenes of drawn objects, and the grammar of their captions.

Read in this order: the vocabulary, `Scene` (what is drawn), `Claim` (what a caption says of it),
`sample_scene` -> `sample_claim` -> `phrase` (scene to caption), `parse` (caption back to claim), `draw`.
Every scene is a pure function of (seed, index), so shards are reproducible and splits never overlap.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (245, 140, 20),
    "yellow": (240, 222, 40),
    "green": (36, 156, 60),
    "cyan": (60, 212, 224),
    "blue": (36, 70, 222),
    "purple": (132, 44, 172),
    "pink": (246, 134, 196),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "gray": (128, 128, 128),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Radius of the circle that a shape is drawn in, as a share of the picture's side.
SIZES = {"small": 0.15, "large": 0.22}
# Centre of a single object as (x, y) shares of the picture's sides.
PLACES = {
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "center": (0.5, 0.5),
}
# The two ends that related objects stand at: far enough apart that two large ones never touch.
NEAR_END, FAR_END = 0.25, 0.75
RELATIONS = ("above", "below", "left of", "right of")
COUNT_WORDS = {1: "one", 2: "two", 3: "three"}

# Colour-shape pairs that no training or validation caption contains; each shape occurs once. They form the
# zero-shot test prompts: both words were seen, their combination never was.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "star"),
        ("orange", "square"),
        ("yellow", "cross"),
        ("green", "circle"),
        ("cyan", "triangle"),
        ("blue", "ring"),
    }
)

# Several wordings of each idea; the first is the plain one.
_PLACE_WORDS = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "center": ("in the center", "in the middle"),
}
_RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
_BACKGROUND_WORDS = ("on a {} background", "with a {} background")
_OPENINGS = ("", "there is ", "there are ", "a picture of ")


@dataclass(frozen=True, kw_only=True)
class DrawnObject:
    """One object of a scene: `x`, `y` (centre) and `radius` are shares of the picture's side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that decides a picture. `kind` is `single`, `pair` or `count`.

    `place` is the single object's place; `relation` reads "objects[0] is <relation> objects[1]".
    """

    kind: str
    background: str
    objects: tuple[DrawnObject, ...]
    place: str | None = None
    relation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain JSON types, as it stands in a sample's `.json`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What a caption says of one object, or of `count` equal ones; None means it is not said."""

    shape: str
    color: str
    size: str | None = None
    place: str | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Claim:
    """All that a caption says. With a relation there are two things, else one."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True, kw_only=True)
class SceneMix:
    """How often each kind of scene occurs (weights, any positive scale) and how much objects move."""

    single: float = 0.6  # weight of scenes with one object
    pair: float = 0.2  # weight of scenes with two related objects
    count: float = 0.2  # weight of scenes with equal objects
    # Largest shift of a centre as a share of the side, in [0, 0.02]; radii vary by twice that share of themselves.
    jitter: float = 0.02

    def __post_init__(self) -> None:
        weights = (self.single, self.pair, self.count)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"scene weights must be >= 0 and not all 0, got {weights}")
        if not 0 <= self.jitter <= 0.02:
            raise ValueError(f"jitter must be in [0, 0.02] so that objects stay inside, got {self.jitter}")


def sample_scene(rng: np.random.Generator, mix: SceneMix, *, held_out: bool = False) -> Scene:
    """A random scene; with `held_out` its first object is a held-out pair, else none of them is."""
    weights = np.array([mix.single, mix.pair, mix.count], dtype=float)
    kind = str(rng.choice(["single", "pair", "count"], p=weights / weights.sum()))
    background = _choose(rng, tuple(BACKGROUNDS))
    color, shape = _sample_pair(rng, held_out=held_out)
    size = _choose(rng, tuple(SIZES))
    if kind == "single":
        place = _choose(rng, tuple(PLACES))
        thing = _place_object(rng, mix, shape, color, size, PLACES[place])
        return Scene(kind=kind, background=background, objects=(thing,), place=place)
    if kind == "pair":
        return _sample_related(rng, mix, background, (color, shape), held_out=held_out)
    centers = _count_centers(rng, int(rng.integers(2, 4)))
    # Three large objects do not fit; counted objects are small.
    objects = tuple(_place_object(rng, mix, shape, color, "small", center) for center in centers)
    return Scene(kind=kind, background=background, objects=objects)


def _sample_related(
    rng: np.random.Generator, mix: SceneMix, background: str, first: tuple[str, str], *, held_out: bool
) -> Scene:
    """Two different objects, one beside or above the other; in a held-out scene either may be the held-out one."""
    second = first
    while second == first:
        second = _sample_pair(rng, held_out=False)
    pairs = [first, second]
    if held_out and rng.random() < 0.5:
        pairs.reverse()
    relation = _choose(rng, RELATIONS)
    ends = (NEAR_END, FAR_END) if relation in ("above", "left of") else (FAR_END, NEAR_END)
    vertical = relation in ("above", "below")
    objects = tuple(
        _place_object(rng, mix, shape, color, _choose(rng, tuple(SIZES)), (0.5, end) if vertical else (end, 0.5))
        for (color, shape), end in zip(pairs, ends, strict=True)
    )
    return Scene(kind="pair", background=background, objects=objects, relation=relation)


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _sample_pair(rng: np.random.Generator, *, held_out: bool) -> tuple[str, str]:
    """A (colour, shape) pair, uniform over the held-out ones or over all others."""
    if held_out:
        pairs = sorted(HELD_OUT)
        return pairs[int(rng.integers(len(pairs)))]
    while True:
        pair = (_choose(rng, tuple(COLORS)), _choose(rng, SHAPES))
        if pair not in HELD_OUT:
            return pair


def _place_object(
    rng: np.random.Generator, mix: SceneMix, shape: str, color: str, size: str, center: tuple[float, float]
) -> DrawnObject:
    dx, dy = rng.uniform(-mix.jitter, mix.jitter, size=2)
    radius = SIZES[size] * (1 + 2 * rng.uniform(-mix.jitter, mix.jitter))
    x, y, radius = (round(float(value), 4) for value in (center[0] + dx, center[1] + dy, radius))
    return DrawnObject(shape=shape, color=color, size=size, x=x, y=y, radius=radius)


def _count_centers(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """`count` centres in a row, a column or (for three) a triangle, far enough apart never to touch."""
    if count == 2:
        layouts = ([(0.25, 0.5), (0.75, 0.5)], [(0.5, 0.25), (0.5, 0.75)])
    else:
        layouts = ([(0.5, 0.25), (0.25, 0.75), (0.75, 0.75)], [(0.25, 0.25), (0.75, 0.25), (0.5, 0.75)])
    return layouts[int(rng.integers(len(layouts)))]


def sample_claim(rng: np.random.Generator, scene: Scene) -> Claim:
    """What a caption of `scene` will say: size, place and background are each sometimes left out."""
    first = scene.objects[0]
    background = scene.background if rng.random() < 0.6 else None
    if scene.kind == "pair":
        things = tuple(
            Thing(shape=thing.shape, color=thing.color, size=thing.size if rng.random() < 0.3 else None)
            for thing in scene.objects
        )
        return Claim(things=things, relation=scene.relation, background=background)
    size = first.size if rng.random() < (0.7 if scene.kind == "single" else 0.3) else None
    place = scene.place if scene.kind == "single" and rng.random() < 0.8 else None
    thing = Thing(shape=first.shape, color=first.color, size=size, place=place, count=len(scene.objects))
    return Claim(things=(thing,), background=background)


def phrase(claim: Claim, rng: np.random.Generator | None = None) -> str:
    """Words for a claim; with `rng` one of several wordings, without it the plain one."""

    def pick(options: tuple[str, ...]) -> str:
        # The plain wording is the most frequent one.
        if rng is None or rng.random() < 0.5:
            return options[0]
        return _choose(rng, options)

    parts = [_noun_phrase(thing, pick) for thing in claim.things]
    text = f" {pick(_RELATION_WORDS[claim.relation])} ".join(parts) if claim.relation else parts[0]
    if claim.background:
        text = f"{text} {pick(_BACKGROUND_WORDS).format(claim.background)}"
    verb = "there is " if claim.things[0].count == 1 else "there are "
    return pick(("", verb, "a picture of ")) + text


def _noun_phrase(thing: Thing, pick: Any) -> str:
    words = [word for word in (thing.size, thing.color, thing.shape) if word]
    if thing.count > 1:
        words[-1] = {"cross": "crosses"}.get(thing.shape, thing.shape + "s")
        article = COUNT_WORDS[thing.count]
    else:
        article = "an" if words[0][0] in "aeiou" else "a"
    text = f"{article} {' '.join(words)}"
    return f"{text} {pick(_PLACE_WORDS[thing.place])}" if thing.place else text


def _alternatives(words: Any) -> str:
    return "|".join(sorted((re.escape(word) for word in words), key=len, reverse=True))


_PLACE_OF = {words: place for place, options in _PLACE_WORDS.items() for words in options}
_RELATION_OF = {words: relation for relation, options in _RELATION_WORDS.items() for words in options}
_COUNT_OF = {"a": 1, "an": 1} | {word: count for count, word in COUNT_WORDS.items()}
_NOUN = (
    rf"(?P<count>{_alternatives(_COUNT_OF)}) (?:(?P<size>{_alternatives(SIZES)}) )?"
    rf"(?P<color>{_alternatives(COLORS)}) (?P<shape>{_alternatives(SHAPES)})(?P<plural>e?s)?"
    rf"(?: (?P<place>{_alternatives(_PLACE_OF)}))?"
)
_SENTENCE = re.compile(
    rf"(?:{_alternatives(opening for opening in _OPENINGS if opening)})?"
    rf"(?P<first>{re.sub(r'[?]P<[a-z]+>', '?:', _NOUN)})"
    rf"(?: (?P<relation>{_alternatives(_RELATION_OF)}) (?P<second>{re.sub(r'[?]P<[a-z]+>', '?:', _NOUN)}))?"
    rf"(?: (?:on|with) a (?P<background>{_alternatives(BACKGROUNDS)}) background)?"
)


def parse(caption: str) -> Claim:
    """What a caption of this grammar says: the inverse of `phrase`, for any of its wordings.

    Raises: ValueError if the caption is not a sentence of the grammar."""
    match = _SENTENCE.fullmatch(" ".join(caption.lower().split()).rstrip("."))
    if match is None:
        example = "a small red star on the left on a gray background"
        raise ValueError(f"caption must be a sentence of the shapes grammar, such as {example!r}, got {caption!r}")
    nouns = [match["first"]] + ([match["second"]] if match["second"] else [])
    things = []
    for noun in nouns:
        fields = re.fullmatch(_NOUN, noun)
        assert fields is not None, "the sentence pattern contains the noun pattern"
        things.append(
            Thing(
                shape=fields["shape"],
                color=fields["color"],
                size=fields["size"],
                place=_PLACE_OF[fields["place"]] if fields["place"] else None,
                count=_COUNT_OF[fields["count"]],
            )
        )
    relation = _RELATION_OF[match["relation"]] if match["relation"] else None
    return Claim(things=tuple(things), relation=relation, background=match["background"])


def contradict(claim: Claim, rng: np.random.Generator) -> Claim:
    """`claim` with exactly one attribute changed to another value: a caption that is wrong in one point."""
    index = int(rng.integers(len(claim.things)))
    thing = claim.things[index]
    choices: dict[str, tuple[Any, ...]] = {"shape": SHAPES, "color": tuple(COLORS)}
    if thing.size:
        choices["size"] = tuple(SIZES)
    if thing.place:
        choices["place"] = tuple(PLACES)
    if claim.relation:
        choices["relation"] = RELATIONS
    else:
        choices["count"] = tuple(COUNT_WORDS)
    if claim.background:
        choices["background"] = tuple(BACKGROUNDS)
    field = _choose(rng, tuple(choices))
    owner = claim if field in ("relation", "background") else thing
    others = [value for value in choices[field] if value != getattr(owner, field)]
    changed: Any = replace(owner, **{field: others[int(rng.integers(len(others)))]})
    if owner is claim:
        return changed
    # More than one object has no single place to be at.
    if changed.count > 1:
        changed = replace(changed, place=None)
    things = list(claim.things)
    things[index] = changed
    return replace(claim, things=tuple(things))


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape inside the unit circle, y pointing down; empty for the round ones."""
    if shape == "square":
        corner = 0.84
        return ((-corner, -corner), (corner, -corner), (corner, corner), (-corner, corner))
    if shape == "triangle":
        return ((0.0, -1.0), (0.98, 0.8), (-0.98, 0.8))
    if shape == "star":
        radii = (1.06, 0.44)
        turns = ((radii[k % 2], math.pi * k / 5) for k in range(10))
        return tuple((radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in turns)
    if shape == "cross":
        a, b = 0.98, 0.32
        return (
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        )
    return ()


RING_HOLE = 0.52  # inner radius of a ring as a share of its outer radius


def coverage(shape: str, x: float, y: float, radius: float, side: int) -> np.ndarray:
    """Antialiased mask float32 (side, side) in [0, 1] of one shape; `x`, `y`, `radius` are in pixels.

    Pixels are the mean of 8 x 8 samples, so edges move smoothly with the centre.

    Raises: ValueError for an unknown shape."""
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    scale = 8
    left, top = math.floor(x - 1.1 * radius) - 1, math.floor(y - 1.1 * radius) - 1
    width = math.ceil(2.2 * radius) + 3
    canvas = Image.new("L", (width * scale, width * scale), 0)
    pen = ImageDraw.Draw(canvas)
    # A pixel's centre is at +0.5, a fine sample's too: hence the half-sample shift.
    cx, cy, r = (x - left) * scale - 0.5, (y - top) * scale - 0.5, radius * scale
    if shape in ("circle", "ring"):
        r *= 0.96
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape == "ring":
            hole = r * RING_HOLE
            pen.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
    else:
        pen.polygon([(cx + px * r, cy + py * r) for px, py in outline(shape)], fill=255)
    patch = np.asarray(canvas.reduce(scale), dtype=np.float32) / 255
    mask = np.zeros((side, side), dtype=np.float32)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, side), min(top + width, side)
    if x1 > x0 and y1 > y0:
        mask[y0:y1, x0:x1] = patch[y0 - top : y1 - top, x0 - left : x1 - left]
    return mask


def draw(scene: Scene, side: int) -> np.ndarray:
    """The picture of a scene, uint8 (side, side, 3).

    Raises: ValueError if `side` is below 16, where the shapes can no longer be told apart."""
    if side < 16:
        raise ValueError(f"side must be >= 16 pixels, got {side}")
    picture = np.empty((side, side, 3), dtype=np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        mask = coverage(thing.shape, thing.x * side, thing.y * side, thing.radius * side, side)[..., None]
        picture = picture * (1 - mask) + np.array(COLORS[thing.color], dtype=np.float32) * mask
    return np.rint(picture).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One captioned scene: what is drawn, what is said of it, and in which words."""

    scene: Scene
    claim: Claim
    caption: str


def make_sample(seed: int, index: int, mix: SceneMix, *, held_out: bool = False) -> Sample:
    """Sample number `index` of the data set `seed`: a pure function of its arguments."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    scene = sample_scene(rng, mix, held_out=held_out)
    claim = sample_claim(rng, scene)
    return Sample(scene=scene, claim=claim, caption=phrase(claim, rng))
