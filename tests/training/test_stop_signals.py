"""Signals of schedulers: the state is saved after the update in which they come, and the run goes on from there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
from stage_runs import Train, last

from dalle1.checkpoint import read_checkpoint, weights_sha256
from dalle1.data import loader
from dalle1.evaluation.pictures import read_curves
from dalle1.run_status import read_status

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


@pytest.mark.parametrize("step", [4, 8])
def test_validation_is_left_and_begins_anew(
    train: Train, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stopped:
        train(tmp_path, "dvae", KILL[0], f"+callbacks.kill.step={step}", "+callbacks.kill.batch=1")
    assert stopped.value.code == 0
    assert caplog.messages[-1].startswith("SIGTERM has stopped '")
    assert caplog.messages[-1].endswith(f"dvae' after update {step}, which is saved; the same command goes on")
    assert read_checkpoint(last(tmp_path, "dvae"))["global_step"] == step
    assert read_status(tmp_path / "dvae" / "status.json").state == "stopped"
    # It has not come to its end.
    assert len(read_curves(tmp_path / "dvae").get("val/loss", [])) == step // 4 - 1

    train(tmp_path, "dvae")
    whole, resumed = (read_checkpoint(last(results, "dvae")) for results in (trained, tmp_path))
    for part in ("state_dict", "ema"):
        assert weights_sha256(resumed[part]) == weights_sha256(whole[part])
    curves, of_whole = (read_curves(results / "dvae") for results in (tmp_path, trained))
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/psnr_db"):
        if step == 4:
            assert curves[name] == of_whole[name]
        assert curves[name][-1] == of_whole[name][-1]


def test_signal_in_the_last_validation_ends_it(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    (tmp_path / "dvae" / "summary.json").unlink()
    # One more update, so that there is something to train and the validation after all updates is another one.
    options = ("optim.max_steps=9", "trainer.val_check_interval=100")
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, "dvae", *options, KILL[0], "+callbacks.kill.step=9", "+callbacks.kill.batch=0")
    assert stopped.value.code == 0
    assert read_status(tmp_path / "dvae" / "status.json").state == "stopped"
    assert train(tmp_path, "dvae", *options)["step"] == 9
    assert read_status(tmp_path / "dvae" / "status.json").state == "complete"


def test_update_of_several_batches_is_made_to_its_end(train: Train, tmp_path: Path) -> None:
    options = ("+trainer.accumulate_grad_batches=2", "trainer.val_check_interval=16")
    train(tmp_path / "whole", "dvae", *options)
    with pytest.raises(SystemExit):
        train(tmp_path / "resumed", "dvae", *options, *KILL)
    assert read_checkpoint(last(tmp_path / "resumed", "dvae"))["global_step"] == 6
    train(tmp_path / "resumed", "dvae", *options)
    whole, resumed = (read_checkpoint(last(tmp_path / run, "dvae")) for run in ("whole", "resumed"))
    assert weights_sha256(resumed["state_dict"]) == weights_sha256(whole["state_dict"])


def test_signal_in_the_last_update_leaves_the_validation_to_the_next_start(
    train: Train, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, "dvae", "trainer.val_check_interval=100", KILL[0], "+callbacks.kill.step=7")
    assert stopped.value.code == 0
    summary = train(tmp_path, "dvae", "trainer.val_check_interval=100")
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
