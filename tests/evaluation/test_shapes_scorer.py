"""The scorer: right about ground truth, wrong about contradictions, and blind to nothing in between."""

from __future__ import annotations

import numpy as np
import pytest

from dalle1.data.shapes import SceneMix, contradict, draw, make_sample, parse, phrase
from dalle1.evaluation.shapes_scorer import score, see, summarize

SIDES = (48, 64, 96)


@pytest.mark.parametrize("held_out", [False, True], ids=["seen", "held-out"])
@pytest.mark.parametrize("side", SIDES)
def test_ground_truth_is_right(side: int, held_out: bool) -> None:
    objects = []
    for index in range(250):
        sample = make_sample(3, index, SceneMix(), held_out=held_out)
        objects += score(draw(sample.scene, side), sample.caption).objects_right
    # The bound asked for is 99.5% of the objects.
    assert len(objects) > 250
    assert np.mean(objects) >= 0.995


@pytest.mark.parametrize("held_out", [False, True], ids=["seen", "held-out"])
@pytest.mark.parametrize("side", SIDES)
def test_caption_that_differs_in_one_attribute_is_wrong(side: int, held_out: bool) -> None:
    rng = np.random.default_rng(4)
    wrong = []
    for index in range(250):
        sample = make_sample(4, index, SceneMix(), held_out=held_out)
        caption = phrase(contradict(parse(sample.caption), rng), rng)
        wrong.append(not score(draw(sample.scene, side), caption).right)
    assert np.mean(wrong) >= 0.99


def scene(*objects: tuple[str, str, str, float, float], background: str = "white") -> np.ndarray:
    from dalle1.data.shapes import SIZES, DrawnObject, Scene

    drawn = tuple(
        DrawnObject(shape=shape, color=color, size=size, x=x, y=y, radius=SIZES[size])
        for shape, color, size, x, y in objects
    )
    return draw(Scene(kind="single", background=background, objects=drawn), 64)


LEFT_STAR = ("star", "red", "small", 0.25, 0.5)


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a red star", set()),
        ("a small red star on the left on a white background", set()),
        ("a blue star", {"color"}),
        ("a red circle", {"shape"}),
        ("a large red star", {"size"}),
        ("a red star on the right", {"place"}),
        ("a red star on a black background", {"background"}),
        ("two red stars", {"color", "shape", "count"}),
    ],
)
def test_each_attribute_is_judged_by_itself(prompt: str, wrong: set[str]) -> None:
    verdict = score(scene(LEFT_STAR), prompt)
    assert {name for name, share in verdict.attributes.items() if share < 1} == wrong
    assert verdict.right == (not wrong)


def test_object_too_many_is_wrong() -> None:
    verdict = score(scene(LEFT_STAR, ("circle", "blue", "small", 0.75, 0.5)), "a red star")
    assert verdict.attributes["count"] == 0
    assert not verdict.right


def test_missing_object_is_wrong() -> None:
    verdict = score(scene(), "a red star on a white background")
    assert verdict.attributes == {"color": 0, "shape": 0, "count": 0, "background": 1}


def test_relation_is_that_of_the_named_objects() -> None:
    picture = scene(("star", "red", "small", 0.5, 0.25), ("circle", "blue", "large", 0.5, 0.75))
    assert score(picture, "a red star above a blue circle").right
    assert score(picture, "a large blue circle below a small red star").right
    assert score(picture, "a blue circle above a red star").attributes["relation"] == 0
    assert score(picture, "a red star to the left of a blue circle").attributes["relation"] == 0


@pytest.mark.parametrize("noise", [2.0, 6.0])
def test_faint_noise_changes_no_verdict(noise: float) -> None:
    rng = np.random.default_rng(0)
    right = []
    for index in range(60):
        sample = make_sample(5, index, SceneMix())
        picture = draw(sample.scene, 64) + rng.normal(scale=noise, size=(64, 64, 3))
        right.append(score(np.clip(picture, 0, 255).astype(np.uint8), sample.caption).right)
    assert np.mean(right) >= 0.95


def test_summary_is_the_share_right() -> None:
    scores = [score(scene(LEFT_STAR), prompt) for prompt in ("a red star", "a blue star", "a red star on the left")]
    assert summarize(scores) == pytest.approx(
        {"prompt": 2 / 3, "color": 2 / 3, "shape": 1.0, "place": 1.0, "count": 1.0}
    )


def test_nothing_to_summarize_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one score to summarize, got 0"):
        summarize([])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64, 3)), r"must be uint8 \(side, side, 3\), got float64"),
        (np.zeros((64, 64), np.uint8), r"got uint8 \(64, 64\)"),
        (np.zeros((64, 32, 3), np.uint8), r"must be square.*got \(64, 32\)"),
        (np.zeros((8, 8, 3), np.uint8), r"side >= 16, got \(8, 8\)"),
    ],
)
def test_other_arrays_are_refused(picture: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        see(picture)
