"""Signals of schedulers: the state is saved after the update in which they come, and the run goes on from there."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import pytest
from stage_runs import Train, last

from dalle1.checkpoint import read_checkpoint, weights_sha256
from dalle1.data import loader

KILL = ("+callbacks.kill._target_=killing.KillAt", "+callbacks.kill.step=5")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_run_is_saved_and_goes_on_bit_for_bit(
    train: Train, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int, num_workers: int
) -> None:
    before = signal.getsignal(number)
    options = (f"data.num_workers={num_workers}", f"data.cache_images={str(not num_workers).lower()}")
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stopped:
        train(tmp_path, "dvae", *options, *KILL, f"+callbacks.kill.number={int(number)}")
    assert stopped.value.code == 0
    assert caplog.messages[-1].startswith(f"{signal.Signals(number).name} has stopped '")
    assert caplog.messages[-1].endswith("dvae' after update 6, which is saved; the same command goes on")
    assert signal.getsignal(number) is before
    assert read_checkpoint(last(tmp_path, "dvae"))["global_step"] == 6
    assert not (tmp_path / "dvae" / "summary.json").exists()

    summary = train(tmp_path, "dvae", *options)
    assert summary["psnr_db"] == json.loads((trained / "dvae" / "summary.json").read_text())["psnr_db"]
    whole, resumed = (read_checkpoint(last(results, "dvae")) for results in (trained, tmp_path))
    for part in ("state_dict", "ema"):
        assert weights_sha256(resumed[part]) == weights_sha256(whole[part])


def test_update_of_several_batches_is_made_to_its_end(train: Train, tmp_path: Path) -> None:
    options = ("+trainer.accumulate_grad_batches=2", "trainer.val_check_interval=16")
    train(tmp_path / "whole", "dvae", *options)
    with pytest.raises(SystemExit):
        train(tmp_path / "resumed", "dvae", *options, *KILL)
    assert read_checkpoint(last(tmp_path / "resumed", "dvae"))["global_step"] == 6
    train(tmp_path / "resumed", "dvae", *options)
    whole, resumed = (read_checkpoint(last(tmp_path / run, "dvae")) for run in ("whole", "resumed"))
    assert weights_sha256(resumed["state_dict"]) == weights_sha256(whole["state_dict"])


def test_signal_in_the_last_update_changes_nothing(train: Train, trained: Path, tmp_path: Path) -> None:
    summary = train(tmp_path, "dvae", KILL[0], "+callbacks.kill.step=7")
    assert summary["step"] == 8
    assert summary["psnr_db"] == json.loads((trained / "dvae" / "summary.json").read_text())["psnr_db"]


def test_worker_outlives_the_signal_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    alarms: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(signal, "alarm", alarms.append)
    try:
        loader.outlive_stop_signals(0)
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert alarms == [60]
