"""Files of one run of sampling."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dalle1 import results as results_module
from dalle1.decode_and_rank import PromptResult
from dalle1.results import Choice, SampleRun, WrittenRun, new_directory
from dalle1.run_origin import RunOrigin, slug
from dalle1.sampling.image_prompt import ImagePrompt

CHECKPOINTS: dict[str, dict[str, object]] = {"transformer": {"sha256": "aa", "step": 5}, "dvae": {"sha256": "bb"}}
ORIGIN = RunOrigin(
    prompts=["a red circle", "日本"],
    seed=3,
    sampling={"temperature": 0.7},
    negative_prompt=None,
    image_sha256=None,
    dtype="float32",
    grid=[2, 3],
    image_vocab_size=32,
    transformer_sha256="aa",
    dvae_sha256="bb",
)
TOKENS = torch.arange(24).view(4, 2, 3)


def _result(
    prompt: str = "a red circle", *, scores: list[float] | None = None, candidates: list[int] | None = None
) -> PromptResult:
    candidates = candidates or [0, 1]
    images = torch.linspace(0, 1, len(candidates))[:, None, None, None].expand(-1, 3, 4, 6).contiguous()
    return PromptResult(
        prompt=prompt,
        images=images,
        image_tokens=TOKENS[: len(candidates)],
        candidates=candidates,
        scores=scores,
        sampled=4,
    )


CHOICE = Choice(sampled=4, keep=None, reranker=None, paste_kept=False)


def _open(directory: Path, **changes: Any) -> SampleRun:
    return SampleRun.open(directory, replace(ORIGIN, **changes), checkpoints=CHECKPOINTS)


def _finish(run: SampleRun, results: list[PromptResult], **options: Any) -> WrittenRun:
    for number, result in enumerate(results):
        run.write(number, result, CHOICE)
    return run.finish(**({"settings": {"seed": 3}, "reranker": {"kind": "clip"}, "complete": True} | options))


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_run_writes_pictures_grid_gallery_and_manifest(tmp_path: Path) -> None:
    run = _open(tmp_path / "new" / "run")
    written = _finish(run, [_result(scores=[0.5, -0.25], candidates=[3, 0]), _result("日本")])
    assert _names(tmp_path / "new" / "run") == {
        *("0001-a-red-circle-0003.png", "0001-a-red-circle-0000.png"),
        *("0002-prompt-0000.png", "0002-prompt-0001.png"),
        *("grid.png", "index.html", "manifest.json", "tokens"),
    }
    assert _names(tmp_path / "new") == {"run"}
    assert (written.n_pictures, written.n_sampled, written.best_score) == (4, 8, 0.5)
    assert str(written).splitlines() == [
        "4 pictures of 8 sampled, best score 0.500",
        f"grid:     {written.grids[0]}",
        f"gallery:  {written.gallery}",
        f"manifest: {written.manifest}",
    ]


def test_manifest_says_how_each_picture_was_made(tmp_path: Path) -> None:
    written = _finish(_open(tmp_path / "run"), [_result(scores=[0.5, -0.25], candidates=[3, 0]), _result("日本")])
    manifest = json.loads(written.manifest.read_text(encoding="utf-8"))
    assert manifest["format_version"] == 2
    assert manifest["complete"] is True
    assert manifest["origin"] == asdict(ORIGIN)
    assert manifest["settings"] == {"seed": 3}
    assert manifest["checkpoints"] == CHECKPOINTS
    assert manifest["reranker"] == {"kind": "clip"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["grids"] == ["grid.png"]
    first, second = manifest["prompts"]
    assert first == {
        "prompt": "a red circle",
        "sampled": 4,
        "pictures": [
            {"file": "0001-a-red-circle-0003.png", "candidate": 3, "score": 0.5},
            {"file": "0001-a-red-circle-0000.png", "candidate": 0, "score": -0.25},
        ],
    }
    assert second["prompt"] == "日本"
    assert second["pictures"][0]["score"] is None


def test_picture_has_its_pixels_and_its_origin(tmp_path: Path) -> None:
    prompt = "日本, 'x'\n${y}"
    _finish(_open(tmp_path / "run"), [_result(prompt, scores=[0.5, 0.1])])
    with Image.open(tmp_path / "run" / "0001-x-y-0001.png") as picture:
        assert np.asarray(picture).shape == (4, 6, 3)
        assert (np.asarray(picture) == 255).all()
        assert len(picture.info.pop("pixels_sha256")) == 64
        assert picture.info == {
            "prompt": prompt,
            "seed": "3",
            "candidate": "1",
            "sampling": '{"temperature":0.7,"negative_prompt":null,"dtype":"float32"}',
            "score": "0.100000",
            "transformer_sha256": "aa",
            "dvae_sha256": "bb",
            "image_tokens": "[[6,7,8],[9,10,11]]",
        }


def test_many_prompts_fill_several_grids(tmp_path: Path) -> None:
    written = _finish(_open(tmp_path / "run"), [_result()] * 70)
    assert [path.name for path in written.grids] == ["grid-001.png", "grid-002.png"]
    assert all(path.is_file() for path in written.grids)
    fewer = _finish(_open(tmp_path / "run"), [_result()])
    assert [path.name for path in fewer.grids] == ["grid.png"]
    assert not list((tmp_path / "run").glob("grid-*"))


def test_tokens_come_back_and_nothing_is_written_before_them(tmp_path: Path) -> None:
    run = _open(tmp_path / "run")
    assert (run.load(0), run.count(0)) == (None, 0)
    assert not (tmp_path / "run").exists()
    run.save(1, TOKENS[:2])
    again = _open(tmp_path / "run")
    assert again.load(0) is None
    tokens = again.load(1)
    assert tokens is not None
    assert torch.equal(tokens, TOKENS[:2])
    assert tokens.dtype == torch.int64
    assert again.count(1) == 2
    assert not again.is_complete
    again.save(1, TOKENS)
    loaded = SampleRun.reopen(tmp_path / "run").load(1)
    assert loaded is not None
    assert len(loaded) == 4


def test_large_codes_take_more_room(tmp_path: Path) -> None:
    run = _open(tmp_path / "run", image_vocab_size=100_000)
    run.save(0, TOKENS + 70_000)
    tokens = run.load(0)
    assert tokens is not None
    assert torch.equal(tokens, TOKENS + 70_000)


def test_pictures_of_an_earlier_call_are_taken_over_if_they_are_the_same(tmp_path: Path) -> None:
    _finish(_open(tmp_path / "run"), [_result(scores=[0.5, 0.25]), _result("日本")])
    again = _open(tmp_path / "run")
    assert not again.find_written(0, replace(CHOICE, keep=1))
    assert not again.find_written(2, CHOICE)
    assert again.find_written(0, CHOICE)
    assert again.has_written(0)
    assert again.finish(settings={}, reranker=None, complete=True).best_score == 0.5
    assert not list((tmp_path / "run").glob("0002-*")), "what was not taken over goes"
    (tmp_path / "run" / "0001-a-red-circle-0001.png").unlink()
    assert not _open(tmp_path / "run").find_written(0, CHOICE)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"choice": {}, "entry": {"pictures": [{"file": "../a.png"}]}}'])
def test_choice_that_is_damaged_is_made_again(tmp_path: Path, content: str) -> None:
    run = _open(tmp_path / "run")
    _finish(run, [_result()])
    (tmp_path / "run" / "tokens" / "0001.json").write_text(content)
    assert not _open(tmp_path / "run").find_written(0, CHOICE)


def test_pictures_that_are_no_longer_kept_go_and_files_of_others_stay(tmp_path: Path) -> None:
    _finish(_open(tmp_path / "run"), [_result(candidates=[0, 1, 2])])
    # Left by a process that died before it said so anywhere.
    (tmp_path / "run" / "0002-b-0007.png").write_bytes(b"")
    mine = ["notes.txt", "grid-of-mine.png", "0001.png"]
    for name in mine:
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "precious.png").write_text("mine too")
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace("0001-a-red-circle-0001.png", "../precious.png"))
    _finish(_open(tmp_path / "run"), [_result(candidates=[2, 3])])
    assert (tmp_path / "precious.png").exists(), "whatever a manifest says"
    assert _names(tmp_path / "run") == {
        *("0001-a-red-circle-0002.png", "0001-a-red-circle-0003.png"),
        *("grid.png", "index.html", "manifest.json", "tokens", *mine),
    }


def test_run_that_goes_on_is_not_complete(tmp_path: Path) -> None:
    _finish(_open(tmp_path / "run"), [_result()])
    again = _open(tmp_path / "run")
    assert again.is_complete
    again.save(0, TOKENS)
    assert not SampleRun.reopen(tmp_path / "run").is_complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "holds a run with seed 3, this one has 4; choose another out"),
        ({"prompts": ["b", "日本"]}, 'holds a run with the prompt "a red circle", this one has "b"'),
        ({"prompts": ["a red circle"]}, "holds a run with 2 prompts, this one has 1"),
        ({"sampling": {"temperature": 1.0}}, "holds a run with temperature 0.7, this one has 1.0"),
        ({"image_sha256": "x"}, "holds a run with another image, or other cells of it that stay, this one has its own"),
        ({"transformer_sha256": "cc"}, 'holds a run with transformer_sha256 "aa", this one has "cc"'),
    ],
)
def test_run_of_another_origin_is_not_gone_on_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    _finish(_open(tmp_path / "run"), [_result()])
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError, match=message):
        _open(tmp_path / "run", **changes)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


def test_name_stands_for_the_whole_origin() -> None:
    assert ORIGIN.name.startswith("2-prompts-")
    assert replace(ORIGIN, prompts=["A red, circle!"]).name.startswith("a-red-circle-")
    changes: list[dict[str, Any]] = [{}, {"seed": 4}, {"sampling": {}}, {"dvae_sha256": "x"}, {"image_sha256": "x"}]
    assert len({replace(ORIGIN, **change).name for change in changes}) == len(changes)
    assert replace(ORIGIN).name == ORIGIN.name


def test_image_prompt_is_there_again(tmp_path: Path) -> None:
    kept = torch.tensor([[True, True, False], [False, True, False]])
    image = torch.randint(256, (3, 4, 6)).float() / 255
    prompt = ImagePrompt(image=image, image_tokens=TOKENS[0], kept=kept, paste_kept=True)
    run = SampleRun.open(tmp_path / "run", ORIGIN, checkpoints=CHECKPOINTS, image_prompt=prompt)
    run.save(0, TOKENS)
    _finish(run, [_result()], settings={"paste_kept": True})
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.width > 384, "the picture and what of it stays come first"
    again = SampleRun.reopen(tmp_path / "run").image_prompt
    assert again is not None
    assert torch.equal(again.image, image)
    assert torch.equal(again.kept, kept)
    assert again.paste_kept
    assert torch.equal(again.given, prompt.given)


def test_failure_leaves_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[Image.Image]:
        raise OSError("disk full")

    run = _open(tmp_path / "run")
    run.save(0, TOKENS)
    _finish(run, [_result()])

    def pictures() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.suffix in (".png", ".npy")}

    before = pictures()
    monkeypatch.setattr(results_module, "draw_grids", fail)
    with pytest.raises(OSError, match="disk full"):
        _finish(_open(tmp_path / "run"), [_result()])
    assert pictures() == before


@pytest.mark.parametrize("name", ["mine.txt", "image.png", "mask.png", "grid.png", "preview.png"])
def test_directory_with_files_is_never_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match="must not exist yet, be an empty directory or hold a run of the same"):
        _open(tmp_path)
    with pytest.raises(FileExistsError, match=rf"must not exist yet.*, got '.*{name}'"):
        _open(tmp_path / name)
    assert _names(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "precious"


def test_empty_directory_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    written = _finish(_open(Path()), [_result()])
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert str(written.manifest) == "manifest.json"


def _other_grid(directory: Path) -> None:
    np.save(directory / "tokens" / "0001.npy", np.zeros((2, 3, 2), dtype=np.uint16))


def _other_codes(directory: Path) -> None:
    np.save(directory / "tokens" / "0001.npy", np.full((2, 2, 3), 32, dtype=np.uint16))


def _fractions(directory: Path) -> None:
    np.save(directory / "tokens" / "0001.npy", np.full((2, 2, 3), 1.5))


def _break_tokens(directory: Path) -> None:
    (directory / "tokens" / "0001.npy").write_bytes(b"\x93NUMPY, but no more")


def _pickle_tokens(directory: Path) -> None:
    np.save(directory / "tokens" / "0001.npy", np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [_break_tokens, _pickle_tokens, _other_grid, _other_codes, _fractions])
def test_damaged_tokens_are_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = _open(tmp_path / "run")
    run.save(0, TOKENS)
    damage(tmp_path / "run")
    with pytest.raises(ValueError, match=r"0001\.npy' is damaged \(.*\); delete it, and its pictures are sampled"):
        run.load(0)


@pytest.mark.parametrize("damage", [_break_tokens, _pickle_tokens])
def test_damaged_tokens_are_not_counted(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run = _open(tmp_path / "run")
    run.save(0, TOKENS)
    damage(tmp_path / "run")
    with pytest.raises(ValueError, match=r"0001\.npy' is damaged \(.*\); delete it, and its pictures are sampled"):
        run.count(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 2, "origin": {}}', "is damaged"),
        (json.dumps({"format_version": 2, "origin": asdict(ORIGIN)}), "is damaged .it lacks checkpoints, complete, "),
        ('{"format_version": 1}', "must have format version 2, got 1"),
    ],
)
def test_manifest_that_cannot_be_used_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        SampleRun.reopen(tmp_path)


def test_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold a run of sample\.py, it has no manifest\.json"):
        SampleRun.reopen(tmp_path)


def test_new_directory_is_always_new(tmp_path: Path) -> None:
    # Within one second names would repeat; all three calls run faster than that or get another time.
    names = set()
    for _ in range(3):
        path = new_directory(tmp_path, "a")
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
