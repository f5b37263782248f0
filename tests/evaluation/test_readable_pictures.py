"""Pictures that cannot be decoded: an error that names the way out, or left out and counted."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1.evaluation.picture_sets import PictureSet, Treatment, open_pictures
from dalle1.evaluation.ranks import Ranks
from dalle1.evaluation.readable_pictures import readable

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def good_and_bad(write_pictures: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same 24 pictures twice; the second folder has three bad ones among them."""
    good = write_pictures(tmp_path / "good", 24)
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    (bad / "000a.png").write_bytes(b"no picture")
    (bad / "010a.png").write_bytes((good / "010.png").read_bytes()[:60])
    (bad / "999.png").write_bytes(b"")
    for name in ("000a", "010a", "999"):
        (bad / f"{name}.txt").write_text("nothing to see")
    return good, bad


def test_readable_pictures_stay_in_their_order(
    good_and_bad: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (open_pictures([str(folder)], on_bad_sample="skip") for folder in good_and_bad)
    how: dict[str, Any] = {"cache": tmp_path / "cache", "ranks": Ranks(), "label": "pictures"}
    kept, notes = readable(bad, **how)
    assert [sample.key for sample in kept.samples] == [sample.key for sample in good.samples]
    assert kept.captions == good.captions
    ((a, b),) = kept.decoded(range(10, 12), Treatment(), at_once=2)
    ((c, d),) = good.decoded(range(10, 12), Treatment(), at_once=2)
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert notes == ["pictures: 3 of 27 cannot be decoded and are left out"]
    assert (kept.facts["n_pictures"], kept.facts["skipped"]) == (24, 3)
    assert kept.sha256 != bad.sha256
    assert len([line for line in caplog.messages if line.startswith("skipped: the picture of sample")]) == 3
    # What decodes is kept on disk: nothing is decoded again.
    monkeypatch.setattr(PictureSet, "fault", None)
    assert readable(bad, **how)[0].sha256 == kept.sha256


def test_nothing_is_decoded_beforehand_without_skip(
    good_and_bad: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PictureSet, "fault", None)
    pictures = open_pictures([str(good_and_bad[1])], on_bad_sample="error")
    assert readable(pictures, cache=tmp_path / "cache", ranks=Ranks(), label="") == (pictures, [])
    with pytest.raises(
        ValueError, match=r"'000a.png' in .* cannot be decoded .*; remove it, or set on_bad_sample=skip"
    ):
        list(pictures.decoded(range(2), Treatment(), at_once=2))


def test_rest_of_a_damaged_shard_counts(good_and_bad: tuple[Path, Path], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    with tarfile.open(whole, "w") as shard:
        for path in sorted(good_and_bad[0].iterdir()):
            shard.add(path, path.name)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        open_pictures([str(cut)], on_bad_sample="error")
    how: dict[str, Any] = {"cache": tmp_path / "cache", "ranks": Ranks(), "label": "pictures"}
    kept, notes = readable(open_pictures([str(cut)], on_bad_sample="skip"), **how)
    assert 0 < len(kept) < 24
    assert notes[0].startswith("pictures: damaged shards, of which the rest was used: ")
    assert "cut.tar" in notes[0]


def test_absent_files_of_a_table_are_skipped_until_they_are_there(
    good_and_bad: tuple[Path, Path], tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,caption\ngood/000.png,a\nlate.png,b\n")
    how: dict[str, Any] = {"cache": tmp_path / "cache", "ranks": Ranks(), "label": "pictures"}
    kept, _ = readable(open_pictures([str(table)], on_bad_sample="skip"), **how)
    assert kept.captions == ["a"]
    shutil.copy(good_and_bad[0] / "001.png", tmp_path / "late.png")
    kept, notes = readable(open_pictures([str(table)], on_bad_sample="skip"), **how)
    assert (kept.captions, notes) == (["a", "b"], [])


def test_nothing_left_is_said(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    pictures = open_pictures([str(tmp_path)], on_bad_sample="skip")
    with pytest.raises(ValueError, match="at least one picture must be good, got 2 that cannot be decoded"):
        readable(pictures, cache=tmp_path / "cache", ranks=Ranks(), label="")


def check(run: Run, with_good: tuple[object, ...], with_bad: tuple[object, ...], *, n: int) -> dict[str, Any]:
    """A command gives the same numbers of good pictures as of these with `n` bad ones that are skipped."""
    error = run(*with_bad, out="error", code=1)["error"]
    assert "remove it, or set on_bad_sample=skip" in error
    assert error.count("\n") == 1
    expected = run(*with_good, out="expected")
    content = run(*with_bad, "on_bad_sample=skip", out="skipped")
    assert content["numbers"] == expected["numbers"]
    assert sum(f"{n} of {24 + n} cannot be decoded and are left out" in note for note in content["notes"]) == 1
    return content


def test_tokenizer_skips(run: Run, good_and_bad: tuple[Path, Path], checkpoints: dict[str, Path]) -> None:
    models = (f"dvae={checkpoints['dvae']}", f"extractor=clip:{checkpoints['clip']}")
    good, bad = (("tokenizer", folder, *models) for folder in good_and_bad)
    assert check(run, good, bad, n=3)["pictures"]["pictures"]["skipped"] == 3


def test_system_skips_in_the_reference(run: Run, good_and_bad: tuple[Path, Path], checkpoints: dict[str, Path]) -> None:
    Path("without.json").write_text(json.dumps({"keys": ["003.png"]}))
    models = [f"{name}={checkpoints[name]}" for name in ("transformer", "dvae")]
    more = (*models, f"extractor=clip:{checkpoints['clip']}", "without=without.json", "prompts=4")
    good, bad = (("system", folder, *more) for folder in good_and_bad)
    assert check(run, good, bad, n=3)["pictures"]["reference"]["skipped"] == 3


def test_overlap_skips_in_both_sets(run: Run, good_and_bad: tuple[Path, Path], checkpoints: dict[str, Path]) -> None:
    extractor = f"extractor=clip:{checkpoints['clip']}"
    for name, other in (("train", "val"), ("val", "train")):
        good, bad = (
            ("overlap", f"{name}={folder}", f"{other}={good_and_bad[0]}", extractor) for folder in good_and_bad
        )
        content = check(run, good, bad, n=3)
        assert content["pictures"][name]["skipped"] == 3
        assert content["pictures"][other]["skipped"] == 0
        for out in ("expected", "skipped"):
            shutil.rmtree(out)
