"""Writing the generated data set: layout, reproducibility, and what happens to existing directories."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.data import shapes_shards
from dalle1.data.shapes import HELD_OUT, SceneMix, draw, make_sample, parse
from dalle1.data.shapes_shards import ShapesRecipe, write_shapes
from dalle1.data.shards import ShardIndex

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> ShapesRecipe:
    return ShapesRecipe(
        directory=str(tmp_path / "parent" / "shapes"),
        train_samples=5,
        val_samples=2,
        test_samples=3,
        image_size=16,
        samples_per_shard=2,
    )


def content(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_shards_hold_the_documented_layout(recipe: ShapesRecipe) -> None:
    write_shapes(recipe)
    assert sorted(content(recipe.directory)) == [
        "recipe.json",
        "test-00000.tar",
        "test-00001.tar",
        "train-00000.tar",
        "train-00001.tar",
        "train-00002.tar",
        "val-00000.tar",
    ]
    index = ShardIndex(f"{recipe.directory}/train-*.tar")
    assert [sample.key for sample in index] == [f"{i:09d}" for i in range(5)]
    raw, made = index[3], make_sample(0, 3, recipe.mix)
    assert raw.text() == made.caption
    assert raw.metadata() == {
        "caption": made.caption,
        "key": "000000003",
        "status": "success",
        "width": 16,
        "height": 16,
        "scene": json.loads(json.dumps(made.scene.to_dict())),
    }
    assert (np.asarray(Image.open(io.BytesIO(raw.image()))) == draw(made.scene, 16)).all()


def test_test_split_shows_held_out_pairs_and_the_others_do_not(recipe: ShapesRecipe) -> None:
    write_shapes(recipe)
    for split in ("train", "val", "test"):
        for caption in (sample.text() for sample in ShardIndex(f"{recipe.directory}/{split}-*.tar")):
            pairs = {(thing.color, thing.shape) for thing in parse(caption).things}
            assert bool(pairs & HELD_OUT) == (split == "test")


def test_no_scene_occurs_in_two_splits_or_under_two_seeds(recipe: ShapesRecipe) -> None:
    scenes = []
    for seed in range(2):
        seeded = replace(recipe, directory=f"{recipe.directory}-{seed}", seed=seed)
        write_shapes(seeded)
        index = ShardIndex(f"{seeded.directory}/*.tar")
        scenes += [json.dumps(sample.metadata()["scene"]) for sample in index]
    assert len(set(scenes)) == len(scenes) == 20


def test_same_recipe_gives_the_same_bytes_with_any_number_of_processes(recipe: ShapesRecipe) -> None:
    again = replace(recipe, directory=f"{recipe.directory}-again")
    write_shapes(recipe, n_processes=1)
    write_shapes(again, n_processes=2)
    assert content(recipe.directory) == content(again.directory)


def test_write_refuses_an_existing_directory(recipe: ShapesRecipe) -> None:
    Path(recipe.directory).mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"shapes' exists; delete it or choose another"):
        write_shapes(recipe)


def test_interrupted_write_leaves_nothing(recipe: ShapesRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard = shapes_shards._write_shard

    def interrupt(recipe: ShapesRecipe, directory: Path, shard: Any) -> int:
        if shard[0].startswith("val"):
            raise KeyboardInterrupt
        return write_shard(recipe, directory, shard)

    monkeypatch.setattr(shapes_shards, "_write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(recipe)
    assert list(Path(recipe.directory).parent.iterdir()) == []


def test_ensure_makes_the_shards_once(recipe: ShapesRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.ensure()
    before = content(recipe.directory)
    monkeypatch.setattr(shapes_shards, "write_shapes", lambda recipe: pytest.fail("made again"))
    recipe.ensure()
    assert content(recipe.directory) == before


def test_ensure_names_the_settings_that_differ(recipe: ShapesRecipe) -> None:
    recipe.ensure()
    before = content(recipe.directory)
    other = replace(recipe, seed=4, train_samples=6, mix=SceneMix(pair=0.5))
    with pytest.raises(
        FileExistsError,
        match=r"other settings: train_samples 5, not 6; seed 0, not 4; mix .*0\.2.*0\.5.*; delete it or",
    ):
        other.ensure()
    assert content(recipe.directory) == before


def test_ensure_refuses_a_directory_made_by_someone_else(recipe: ShapesRecipe) -> None:
    Path(recipe.directory).mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"shapes' has no recipe.json; choose another"):
        recipe.ensure()


def test_ensure_names_a_missing_shard(recipe: ShapesRecipe) -> None:
    recipe.ensure()
    (Path(recipe.directory) / "train-00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks train-00001\.tar; delete it"):
        recipe.ensure()


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("train_samples", 0, ValueError, "train_samples must be >= 1, got 0"),
        ("val_samples", "2", TypeError, "val_samples must be an integer >= 1, got '2' of type str"),
        ("test_samples", 2.0, TypeError, r"test_samples must be an integer >= 1, got 2\.0"),
        ("samples_per_shard", True, TypeError, "samples_per_shard must be an integer >= 1, got True"),
        ("image_size", 15, ValueError, "image_size must be >= 16, got 15"),
        ("seed", -1, ValueError, "seed must be >= 0, got -1"),
        ("directory", "", TypeError, "directory must be a path in a string, got ''"),
        ("mix", {"single": 1}, TypeError, r"mix must be a SceneMix, got \{'single': 1\}"),
    ],
)
def test_recipe_refuses_a_wrong_field_by_name(
    recipe: ShapesRecipe, field: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(recipe, **{field: value})


def test_script_makes_the_recipe_of_its_arguments(recipe: ShapesRecipe) -> None:
    spec = importlib.util.spec_from_file_location("make_shapes", REPOSITORY / "data" / "make_shapes.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = ["--train", "5", "--val", "2", "--test", "3", "--image-size", "16", "--samples-per-shard", "2"]
    script.main(["--out", recipe.directory, *sizes])
    recipe.ensure()  # raises if any setting differs


def test_readme_lists_the_held_out_pairs() -> None:
    readme = (REPOSITORY / "data" / "README.md").read_text()
    assert all(f"{color} {shape}" in readme for color, shape in HELD_OUT)
