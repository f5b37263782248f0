"""A run says where it is, in a file that is always whole."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from stage_runs import Train

from dalle1.run_status import RunStatus, read_status
from dalle1.training import status
from dalle1.training.checkpoints import LastCheckpoint


def test_finished_run_is_complete(trained: Path) -> None:
    for stage in ("dvae", "clip", "transformer"):
        said = read_status(trained / stage / "status.json")
        assert (said.stage, said.state, said.step, said.max_steps) == (stage, "complete", 8, 8)
        assert said.checkpoint_step == 8
        assert said.seconds_left == 0
        assert said.error is None


def test_states_follow_one_another(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[RunStatus] = []
    monkeypatch.setattr(status, "write_status", lambda _, each: said.append(each))
    monkeypatch.setattr(status, "EVERY_SECONDS", 0)
    before = time.time()
    train(tmp_path, "dvae", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1")
    states = [each.state for each in said]
    assert states[0] == "training"
    assert states[-1] == "complete"
    assert states.count("validating") == 2
    assert {each.step for each in said if each.state == "training"} >= set(range(9))
    assert all(each.pid == os.getpid() and before <= each.started <= each.updated for each in said)
    assert said[0].loss is None
    assert isinstance(said[-1].loss, float)
    rated = [each for each in said if each.samples_per_second is not None]
    assert rated
    assert all(each.data_wait is not None and 0 <= each.data_wait <= 1 for each in rated)


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [(ValueError("too large"), "failed", "ValueError: too large"), (KeyboardInterrupt(), "stopped", None)],
)
def test_run_that_ends_early_says_why(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str, message: str | None
) -> None:
    save = LastCheckpoint.save

    def fail(self: LastCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        raise error

    monkeypatch.setattr(LastCheckpoint, "save", fail)
    with pytest.raises(type(error)):
        train(tmp_path, "dvae")
    said = read_status(tmp_path / "dvae" / "status.json")
    assert (said.state, said.error, said.step, said.checkpoint_step) == (state, message, 4, 4)
