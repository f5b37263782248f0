"""A full disk costs what could not be written, and not the run; at the end of training it is an error."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import save_on_full_disk
from stage_runs import Train, last

from dalle1.checkpoint import read_checkpoint, weights_sha256
from dalle1.training.checkpoints import LastCheckpoint
from dalle1.training.disk_full import PatientCSVLogger, going_on_if_disk_is_full, is_disk_full

QUICK = ("callbacks.checkpoint.every_n_steps=2", "~callbacks.pictures", "~callbacks.best")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.training.run.save_curves", lambda *_: None)  # which take as long as the training


@pytest.fixture
def disk_is_full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the updates after which it is."""

    def fill(*steps: int) -> None:
        monkeypatch.setattr(torch, "save", save_on_full_disk(steps))

    return fill


def files(results: Path) -> list[str]:
    return sorted(path.name for path in (results / "dvae" / "checkpoints").iterdir())


def test_training_goes_on_without_the_checkpoint_and_tries_again(
    train: Train,
    trained: Path,
    tmp_path: Path,
    disk_is_full: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk_is_full(4, 6)
    work, seen = LastCheckpoint.save, []

    def save(self: LastCheckpoint, trainer: Any) -> None:
        work(self, trainer)
        seen.append((trainer.global_step, read_checkpoint(self.path)["global_step"], files(tmp_path)))

    monkeypatch.setattr(LastCheckpoint, "save", save)
    train(tmp_path, "dvae", *QUICK)
    one, both = ["last.ckpt", "step0000002.ckpt"], ["last.ckpt", "step0000002.ckpt", "step0000008.ckpt"]
    assert seen == [(2, 2, one), (4, 2, one), (6, 2, one), (8, 8, both)]
    told = [message for message in caplog.messages if "disk is full" in message]
    assert len(told) == 2
    assert all("last.ckpt' could not be written: the disk is full, about 0.0" in message for message in told)
    assert all("GB free; training goes on, the next one is tried in its turn" in message for message in told)
    mine, theirs = read_checkpoint(last(tmp_path, "dvae")), read_checkpoint(last(trained, "dvae"))
    assert weights_sha256(mine["state_dict"]) == weights_sha256(theirs["state_dict"])


def test_it_may_stop_the_run(train: Train, tmp_path: Path, disk_is_full: Callable[..., None]) -> None:
    disk_is_full(4)
    with pytest.raises(OSError, match=r"disk is full, .* make room, then the same command goes on from the checkpoint"):
        train(tmp_path, "dvae", *QUICK, "callbacks.checkpoint.on_disk_full=stop")
    assert files(tmp_path) == ["last.ckpt", "step0000002.ckpt"]
    assert json.loads((tmp_path / "dvae" / "status.json").read_text())["state"] == "failed"


def test_at_the_end_it_is_an_error_and_the_same_command_goes_on(
    train: Train, tmp_path: Path, disk_is_full: Callable[..., None]
) -> None:
    disk_is_full(4)
    with pytest.raises(OSError, match=r"last\.ckpt' could not be written: the disk is full"):
        train(tmp_path, "dvae", *QUICK, "optim.max_steps=4")
    assert not (tmp_path / "dvae" / "summary.json").exists()
    assert read_checkpoint(last(tmp_path, "dvae"))["global_step"] == 2
    disk_is_full()
    assert train(tmp_path, "dvae", *QUICK, "optim.max_steps=4")["step"] == 4


def test_other_errors_of_writing_stay_errors(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(OSError, match="read-only"):
        train(tmp_path, "dvae", *QUICK, "optim.max_steps=4")
    assert not is_disk_full(RuntimeError("CUDA out of memory"))
    assert is_disk_full(OSError(errno.EDQUOT, "quota exceeded"))
    with pytest.raises(OSError, match="read-only"), going_on_if_disk_is_full("status.json"):
        refuse()


def test_other_files_cost_one_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        for name in ("status.json", "picture.png"):
            with going_on_if_disk_is_full(tmp_path / name):
                raise OSError(errno.ENOSPC, "No space left on device")
    assert caplog.messages == [
        f"'{tmp_path / name}' could not be written: the disk is full; going on without (said once)"
        for name in ("status.json", "picture.png")
    ]


@pytest.mark.parametrize("is_new", [True, False])
def test_log_keeps_its_rows_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool) -> None:
    log = PatientCSVLogger(tmp_path, name="logs")
    if not is_new:
        log.log_metrics({"loss": 0.0}, step=0)
        log.save()
    log.log_metrics({"loss": 1.0}, step=1)
    write = csv.DictWriter.writerows

    def half(self: Any, rows: Any) -> None:
        write(self, rows)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", half)
        log.save()
    log.log_metrics({"loss": 2.0}, step=2)
    log.save()
    with (Path(log.log_dir) / "metrics.csv").open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["0.0", "1.0", "2.0"][is_new:]


def test_other_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint\.on_disk_full must be continue or stop, got 'wait'"):
        LastCheckpoint("run", every_n_steps=1, on_disk_full="wait")  # type: ignore[arg-type]
