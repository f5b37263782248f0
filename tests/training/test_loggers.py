"""What a run shows in TensorBoard and in Weights & Biases: curves and pictures, through a stop and a resume."""

from __future__ import annotations

import errno
import threading
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stage_runs import Train, stop_at_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dalle1.training.logging import log_picture
from dalle1.training.tensorboard import TensorBoard

# Lightning numbers updates from 0, and a validation as the update before it; the last state is validated once more.
UPDATES, VALIDATIONS = list(range(8)), [3, 7, 8]
PICTURES = ("reconstructions", "code_use")


@pytest.fixture(scope="module")
def logged() -> list[tuple[str, dict[str, Any]]]:
    """What W&B is told in `resumed`: id of its run, numbers and pictures."""
    return []


@pytest.fixture(scope="module")
def resumed(train: Train, tmp_path_factory: pytest.TempPathFactory, logged: list[tuple[str, dict[str, Any]]]) -> Path:
    """A run with both loggers: one start dies in update 6, the next goes on after update 4, where a checkpoint is."""
    import wandb

    results = tmp_path_factory.mktemp("resumed")
    log = wandb.Run.log

    def note(run: Any, data: dict[str, Any], *rest: Any, **more: Any) -> None:
        logged.append((run.id, data))
        log(run, data, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb.Run, "log", note)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        with pytest.MonkeyPatch.context() as first:
            first.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_end", stop_at_step(6))
            with pytest.raises(SystemExit):
                train(results, "dvae", "logger=[wandb,tensorboard]")
        assert train(results, "dvae", "logger=[wandb,tensorboard]")["step"] == 8
    assert wandb.run is None, "the next job of a sweep would log into it"
    return results / "dvae"


def events(directory: Path) -> EventAccumulator:
    """All that TensorBoard would show of a directory."""
    return EventAccumulator(str(directory)).Reload()


def test_resumed_run_goes_on_in_the_same_curves_of_tensorboard(resumed: Path) -> None:
    shown = events(resumed / "tensorboard")
    # Update 5 was made twice, and is there once.
    assert [point.step for point in shown.Scalars("train/loss")] == UPDATES
    assert [point.step for point in shown.Scalars("val/loss")] == VALIDATIONS
    for name in PICTURES:
        drawn = shown.Images(f"val/{name}")
        assert [picture.step for picture in drawn] == VALIDATIONS
        with Image.open(resumed / "pictures" / f"{name}-step0000004.png") as file:
            assert (drawn[0].width, drawn[0].height) == file.size
    files = [path.name for path in (resumed / "tensorboard").iterdir()]
    assert all(name.startswith("events.out.tfevents.") for name in files), "one directory, nothing else in it"


def test_resumed_run_is_one_run_of_weights_and_biases(resumed: Path, logged: list[tuple[str, dict[str, Any]]]) -> None:
    assert {run_id for run_id, _ in logged} == {(resumed / "wandb_id").read_text()}
    assert len(list((resumed / "wandb").glob("offline-run-*"))) == 2
    for name in PICTURES:
        assert [data["trainer/global_step"] for _, data in logged if f"val/{name}" in data] == VALIDATIONS
        media = (resumed / "wandb").glob(f"offline-run-*/files/media/images/val/{name}_*.png")
        assert len(list(media)) == len(VALIDATIONS)


def test_pictures_are_shown_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    logger = TensorBoard(str(tmp_path))
    log_picture([logger], "val/samples", Image.fromarray(pixels), step=3)
    logger.finalize("success")
    (drawn,) = events(tmp_path).Images("val/samples")
    (tmp_path / "drawn.png").write_bytes(drawn.encoded_image_string)
    with Image.open(tmp_path / "drawn.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)


def test_tensorboard_must_be_installed(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    there = util.find_spec
    monkeypatch.setattr(
        "dalle1.training.tensorboard.find_spec", lambda name: None if name == "tensorboard" else there(name)
    )
    with pytest.raises(Exception, match=r"needs tensorboard, which is not installed; pip install '\.\[tensorboard\]'"):
        train(tmp_path, "dvae", "logger=tensorboard")
    assert not (tmp_path / "dvae").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread writes
def test_full_disk_costs_the_curves_and_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    others = set(threading.enumerate())
    logger = TensorBoard(str(tmp_path))
    logger.log_metrics({"train/loss": 1.0}, step=0)
    logger.save()
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", refuse)
    for step in (1, 2):
        logger.log_metrics({"train/loss": 1.0}, step=step)
        logger.save()
        logger.log_picture("val/samples", Image.new("RGB", (2, 2)), step)
    logger.finalize("failed")
    for thread in set(threading.enumerate()) - others:
        thread.join()  # else the error that ends it is another test's
    assert [point.step for point in events(tmp_path).Scalars("train/loss")] == [0]
    (message,) = [record.message for record in caplog.records if "could not be written" in record.message]
    assert "the disk is full; going on without" in message
