"""Which checkpoints stay, and what happens when the last one is damaged."""

from __future__ import annotations

import csv
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import Train, last

from dalle1.checkpoint import DamagedCheckpointError, read_checkpoint, weights_sha256
from dalle1.evaluation.pictures import read_curves
from dalle1.training.checkpoints import LastCheckpoint


def names(results: Path) -> list[str]:
    paths = (results / "dvae" / "checkpoints").iterdir()
    return sorted(path.name for path in paths if path.stem != "best")


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    """A complete run with checkpoints of updates 4 and 8."""
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    last(tmp_path, "dvae").unlink()
    os.link(tmp_path / "dvae" / "checkpoints" / "step0000008.ckpt", last(tmp_path, "dvae"))
    return tmp_path


def test_the_last_one_and_the_one_before_it_stay(trained: Path) -> None:
    assert names(trained) == ["last.ckpt", "step0000004.ckpt", "step0000008.ckpt"]
    assert os.path.samefile(last(trained, "dvae"), last(trained, "dvae").with_name("step0000008.ckpt"))
    assert read_checkpoint(last(trained, "dvae").with_name("step0000004.ckpt"))["global_step"] == 4


def test_others_stay_if_asked_to(train: Train, tmp_path: Path) -> None:
    keep = ("callbacks.checkpoint.keep_last=1", "callbacks.checkpoint.every_n_steps=2")
    train(tmp_path, "dvae", *keep, "callbacks.checkpoint.keep_every_n_steps=4", "optim.max_steps=10")
    assert names(tmp_path) == ["last.ckpt", "step0000004.ckpt", "step0000008.ckpt", "step0000010.ckpt"]
    # What somebody else put there is none of ours.
    last(tmp_path, "dvae").with_name("step0000004-mine.ckpt").touch()
    assert train(tmp_path, "dvae", *keep, "optim.max_steps=12")["step"] == 12


def test_without_links_they_are_copied(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    train(tmp_path, "dvae")
    assert names(tmp_path) == ["last.ckpt", "step0000004.ckpt", "step0000008.ckpt"]
    assert last(tmp_path, "dvae").read_bytes() == last(tmp_path, "dvae").with_name("step0000008.ckpt").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_one_is_named_and_the_one_before_it_gone_on_from(
    train: Train, trained: Path, results: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = last(results, "dvae")  # and under its other name
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flipped":
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
        with path.open("r+b") as file:
            file.seek(largest.header_offset + largest.file_size)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    else:
        path.with_name("step0000008.ckpt").unlink()
        path.unlink()
    train(results, "dvae")
    whole = f"'{path}' is damaged; going on from '{path.with_name('step0000004.ckpt')}'"
    assert (whole in caplog.messages) == (damage != "gone")
    assert names(results) == ["last.ckpt", "step0000004.ckpt", "step0000008.ckpt"]
    content, expected = read_checkpoint(path), read_checkpoint(last(trained, "dvae"))
    for part in ("state_dict", "ema"):
        assert weights_sha256(content[part]) == weights_sha256(expected[part])


def test_nothing_but_damaged_ones_is_an_error(train: Train, results: Path) -> None:
    for path in last(results, "dvae").parent.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt' is not a checkpoint that can be read safely"):
        train(results, "dvae")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, r"callbacks\.checkpoint\.every_n_steps must be >= 1, got 0"),
        ({"keep_last": 0}, r"callbacks\.checkpoint\.keep_last must be >= 1, got 0"),
        ({"keep_every_n_steps": 6}, r"keep_every_n_steps must be a multiple of every_n_steps, 4, .* got 6"),
    ],
)
def test_other_numbers_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LastCheckpoint(str(tmp_path), **({"every_n_steps": 4} | options))  # type: ignore[arg-type]


def test_what_an_update_has_logged_is_on_the_disk_before_its_checkpoint_is(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, on_disk = torch.save, {}

    def look(content: Any, *rest: Any) -> None:
        losses = read_curves(tmp_path / "dvae")["train/loss"]
        on_disk[content["global_step"]] = [step for step, _ in losses]
        save(content, *rest)

    monkeypatch.setattr(torch, "save", look)
    # With a validation after update 4 and none after the others.
    train(tmp_path, "dvae", "callbacks.checkpoint.every_n_steps=2", "trainer.val_check_interval=4")
    assert on_disk == {step: list(range(step)) for step in (2, 4, 6, 8)}
    monkeypatch.undo()
    (log,) = (tmp_path / "dvae").glob("logs/*/metrics.csv")
    with log.open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(8)), "each of them once"
