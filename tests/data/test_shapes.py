"""The generated data set: its grammar, its splits and its drawings."""

from __future__ import annotations

import numpy as np
import pytest

from dalle1.data.shapes import (
    COLORS,
    HELD_OUT,
    SHAPES,
    Claim,
    SceneMix,
    Thing,
    contradict,
    coverage,
    draw,
    make_sample,
    outline,
    parse,
    phrase,
    sample_claim,
    sample_scene,
)


def _mentions_held_out(claim: Claim) -> bool:
    return any((thing.color, thing.shape) in HELD_OUT for thing in claim.things)


def test_parse_inverts_every_wording_of_phrase() -> None:
    rng = np.random.default_rng(0)
    for i in range(400):
        claim = sample_claim(rng, sample_scene(rng, SceneMix(), held_out=i % 2 == 0))
        assert parse(phrase(claim)) == claim
        assert parse(phrase(claim, rng)) == claim


def test_parse_refuses_a_sentence_outside_the_grammar() -> None:
    with pytest.raises(ValueError, match=r"must be a sentence of the shapes grammar.*got 'a cat'"):
        parse("a cat")


def test_held_out_pairs_never_occur_in_training_captions_and_scenes() -> None:
    for i in range(400):
        sample = make_sample(7, i, SceneMix())
        assert not _mentions_held_out(parse(sample.caption))
        assert all((thing.color, thing.shape) not in HELD_OUT for thing in sample.scene.objects)


def test_every_held_out_caption_names_a_held_out_pair() -> None:
    captions = [make_sample(7, i, SceneMix(), held_out=True).caption for i in range(200)]
    assert all(_mentions_held_out(parse(caption)) for caption in captions)


def test_each_word_of_a_held_out_pair_occurs_in_training() -> None:
    things = {thing for i in range(400) for thing in parse(make_sample(7, i, SceneMix()).caption).things}
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.shape for thing in things} == set(SHAPES)


def test_sample_is_a_function_of_seed_and_index() -> None:
    assert make_sample(3, 5, SceneMix()) == make_sample(3, 5, SceneMix())
    assert make_sample(3, 5, SceneMix()) != make_sample(3, 6, SceneMix())
    assert make_sample(3, 5, SceneMix()) != make_sample(4, 5, SceneMix())


def test_scene_mix_with_one_weight_draws_that_kind_only() -> None:
    mix = SceneMix(single=0, pair=1, count=0)
    assert {make_sample(0, i, mix).scene.kind for i in range(20)} == {"pair"}


@pytest.mark.parametrize(("fields", "number"), [({"single": -1.0}, "-1"), ({"jitter": 0.2}, r"0\.2")])
def test_scene_mix_refuses_a_value_out_of_range(fields: dict[str, float], number: str) -> None:
    with pytest.raises(ValueError, match=number):
        SceneMix(**fields)


def test_contradict_changes_the_claim_and_stays_in_the_grammar() -> None:
    rng = np.random.default_rng(1)
    for i in range(200):
        claim = parse(make_sample(0, i, SceneMix()).caption)
        other = contradict(claim, rng)
        assert other != claim
        assert parse(phrase(other)) == other


def test_draw_puts_the_object_at_its_place_in_its_color() -> None:
    scene = next(
        scene
        for i in range(100)
        if (scene := make_sample(0, i, SceneMix()).scene).place == "left" and scene.kind == "single"
    )
    thing = scene.objects[0]
    picture = draw(scene, 64).astype(int)
    mask = coverage(thing.shape, thing.x * 64, thing.y * 64, thing.radius * 64, 64) == 1
    assert picture.shape == (64, 64, 3)
    assert mask.any()
    assert not mask[:, 40:].any()
    assert (picture[mask] == COLORS[thing.color]).all()


def test_draw_refuses_a_side_too_small_to_tell_shapes_apart() -> None:
    with pytest.raises(ValueError, match="got 8"):
        draw(make_sample(0, 0, SceneMix()).scene, 8)


def test_coverage_refuses_an_unknown_shape() -> None:
    with pytest.raises(ValueError, match="got 'heart'"):
        coverage("heart", 8, 8, 4, 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_of_every_shape_is_inside_its_box(shape: str) -> None:
    mask = coverage(shape, 10, 22, 6, 32)
    rows, cols = np.nonzero(mask)
    assert 0 <= mask.min() <= mask.max() == 1
    # Two pixels: corners of stars reach 1.06 radii, and antialiasing one pixel further.
    assert 10 - 8 <= cols.min() <= cols.max() <= 10 + 8
    assert 22 - 8 <= rows.min() <= rows.max() <= 22 + 8
    assert bool(outline(shape)) == (shape not in ("circle", "ring"))


def test_phrase_says_count_size_place_and_background() -> None:
    thing = Thing(shape="cross", color="blue", size="small", count=3)
    assert phrase(Claim(things=(thing,), background="black")) == "three small blue crosses on a black background"
