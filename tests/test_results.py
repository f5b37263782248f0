"""Files of one run of sampling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1 import results as results_module
from dalle1.atomic_files import check_directory
from dalle1.pipeline import PromptResult
from dalle1.results import default_directory, slug, write_run

CHECKPOINTS: dict[str, dict[str, object]] = {"transformer": {"sha256": "aa", "step": 5}, "dvae": {"sha256": "bb"}}


def _result(prompt: str = "a red circle", *, scores: list[float] | None = None, n_pictures: int = 2) -> PromptResult:
    images = torch.linspace(0, 1, n_pictures)[:, None, None, None].expand(-1, 3, 4, 6).contiguous()
    tokens = torch.zeros(n_pictures, 1, 1, dtype=torch.int64)
    return PromptResult(
        prompt=prompt, images=images, image_tokens=tokens, seeds=list(range(70, 70 + n_pictures)), scores=scores
    )


def test_run_writes_pictures_grid_and_manifest(tmp_path: Path) -> None:
    run = write_run(
        [_result(scores=[0.5, -0.25]), _result("日本")],
        tmp_path / "new" / "run",
        settings={"seed": 3},
        checkpoints=CHECKPOINTS,
    )
    names = {path.name for path in (tmp_path / "new" / "run").iterdir()}
    assert names == {
        *("0001-a-red-circle-001.png", "0001-a-red-circle-002.png", "0002-prompt-001.png", "0002-prompt-002.png"),
        *("grid.png", "manifest.json"),
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run"]
    assert run.grids == [tmp_path / "new" / "run" / "grid.png"]
    assert (run.n_pictures, run.best_score) == (4, 0.5)
    assert str(run).splitlines() == [
        "4 pictures, best score 0.500",
        f"grid:     {run.grids[0]}",
        f"manifest: {run.manifest}",
    ]


def test_manifest_says_how_each_picture_was_made(tmp_path: Path) -> None:
    run = write_run(
        [_result(scores=[0.5, -0.25]), _result("日本")], tmp_path / "run", settings={"seed": 3}, checkpoints=CHECKPOINTS
    )
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    assert manifest["format_version"] == 1
    assert manifest["settings"] == {"seed": 3}
    assert manifest["checkpoints"] == CHECKPOINTS
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["grids"] == ["grid.png"]
    first, second = manifest["prompts"]
    assert first == {
        "prompt": "a red circle",
        "pictures": [
            {"file": "0001-a-red-circle-001.png", "seed": 70, "score": 0.5},
            {"file": "0001-a-red-circle-002.png", "seed": 71, "score": -0.25},
        ],
    }
    assert second["prompt"] == "日本"
    assert second["pictures"][0]["score"] is None


def test_picture_has_its_pixels_and_its_origin(tmp_path: Path) -> None:
    prompt = "日本, 'x'\n${y}"
    write_run([_result(prompt, scores=[0.5, 0.1])], tmp_path / "run", settings={}, checkpoints=CHECKPOINTS)
    with Image.open(tmp_path / "run" / "0001-x-y-002.png") as picture:
        assert np.asarray(picture).shape == (4, 6, 3)
        assert (np.asarray(picture) == 255).all()
        assert picture.info == {
            "prompt": prompt,
            "seed": "71",
            "score": "0.100000",
            "transformer_sha256": "aa",
            "dvae_sha256": "bb",
        }


def test_many_prompts_fill_several_grids(tmp_path: Path) -> None:
    run = write_run([_result()] * 70, tmp_path / "run", settings={}, checkpoints={})
    assert [path.name for path in run.grids] == ["grid-001.png", "grid-002.png"]
    assert all(path.is_file() for path in run.grids)


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(blocks: object) -> list[Image.Image]:
        raise OSError("disk full")

    monkeypatch.setattr(results_module, "draw_grids", fail)
    with pytest.raises(OSError, match="disk full"):
        write_run([_result()], tmp_path / "run", settings={}, checkpoints={})
    assert list(tmp_path.iterdir()) == []


def test_directory_with_files_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="must not exist yet or be an empty directory"):
        write_run([_result()], tmp_path, settings={}, checkpoints={})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match=r"must not exist yet .*, got '.*out'"):
        check_directory(tmp_path / "out")


def test_empty_directory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    run = write_run([_result()], ".", settings={}, checkpoints={})
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert str(run.manifest) == "manifest.json"


def test_default_directory_is_named_after_the_prompt_or_their_number(tmp_path: Path) -> None:
    assert default_directory(tmp_path, ["A red, circle!"]).name.startswith("a-red-circle-20")
    assert default_directory(tmp_path, ["a", "b"]).name.startswith("2-prompts-20")


def test_default_directory_is_always_new(tmp_path: Path) -> None:
    # Within one second names would repeat; all three calls run faster than that or get another time.
    names = set()
    for _ in range(3):
        path = default_directory(tmp_path, ["a"])
        path.mkdir()
        names.add(path.name)
    assert len(names) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", "a-red-circle"),
        ("../../etc/passwd", "etc-passwd"),
        ("Café, ÜBER 2!", "cafe-uber-2"),
        ("日本🐉", "prompt"),
        ("x" * 99, "x" * 40),
        ("word " * 20, "word-word-word-word-word-word-word-word"),
    ],
)
def test_slug_is_short_and_ascii(text: str, expected: str) -> None:
    assert slug(text) == expected
