"""Kills at any moment cost time and nothing else: what comes out is, bit for bit, what would have; ten minutes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from launching import call

from dalle1.checkpoint import read_checkpoint, weights_sha256
from dalle1.evaluation.pictures import read_curves

pytestmark = pytest.mark.slow

KILLS = 20
UPDATES = 2_000
OPTIONS = (
    *("stage=dvae", "image_size=16", "grid_size=2", "image_vocab_size=16", "text_vocab_size=300", "text_seq_len=64"),
    *("data.recipe.image_size=16", "data.recipe.train_samples=90", "data.recipe.val_samples=5"),
    *("data.recipe.test_samples=4", "model.patch_size=8", "model.n_hid=16", "model.n_init=16"),
    *(f"optim.max_steps={UPDATES}", "optim.batch_size=4", "optim.warmup_steps=1", "optim.codebook_start_step=50"),
    *("optim.codebook_start_pictures=16", "callbacks.checkpoint.every_n_steps=20", "trainer.val_check_interval=60"),
    *("trainer.log_every_n_steps=1", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
)
KILL = "+callbacks.kill._target_=killing.KillSometime"


def kill_options(number: int) -> list[str]:
    """The first or the second device, while it trains or while a checkpoint is written."""
    options = [KILL, f"+callbacks.kill.seed={number}", f"+callbacks.kill.rank={number % 2}"]
    if number % 4 < 3:
        # Starts make some hundred updates on the whole, so that the last one does not come too early.
        options.append(f"+callbacks.kill.after={random.Random(number).choice((0.3, 3.0))}")
    return options


def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    done = call(tmp_path, *OPTIONS, f"run_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    killed = [*OPTIONS, f"run_dir={tmp_path / 'killed'}"]
    steps = []
    for number in range(KILLS):
        done = call(tmp_path, *killed, *kill_options(number))
        # Of the first device its own end, of the second what the first says of it.
        assert done.returncode in (-signal.SIGKILL, 1), done.stderr[-2000:]
        assert done.returncode == -signal.SIGKILL or "rank 1 has ended by SIGKILL" in done.stderr, done.stderr[-2000:]
        last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
        steps.append(read_checkpoint(last)["global_step"] if last.exists() else 0)
    print("updates in the checkpoint after each kill:", *steps)
    assert steps == sorted(steps), "nothing is lost that a checkpoint has"
    assert len(set(steps)) > KILLS // 2
    done = call(tmp_path, *killed)
    assert done.returncode == 0, done.stderr

    whole, resumed = (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("whole", "killed"))
    assert resumed["global_step"] == whole["global_step"] == UPDATES
    for part in ("state_dict", "ema"):
        assert weights_sha256(resumed[part]) == weights_sha256(whole[part])
    for mine, other in zip(resumed["optimizer_states"], whole["optimizer_states"], strict=True):
        for weight, state in other["state"].items():
            for name, tensor in state.items():
                assert mine["state"][weight][name].equal(tensor)
    assert resumed["callbacks"] == whole["callbacks"], "the best so far, the losses that are watched"
    curves, expected = (read_curves(tmp_path / run) for run in ("killed", "whole"))
    for name in expected:
        if not name.startswith("perf/"):
            assert curves[name] == expected[name]
    assert not list((tmp_path / "killed").rglob("*.partial"))
