"""Kills at any moment cost time and nothing else: what comes out is, bit for bit, what would have; ten minutes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from launching import call
from preemption_soak import compare

from dalle1.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

KILLS = 20
UPDATES = 700
OPTIONS = (
    *("stage=dvae", "image_size=16", "grid_size=2", "image_vocab_size=16", "text_vocab_size=300", "text_seq_len=64"),
    *("data.recipe.image_size=16", "data.recipe.train_samples=90", "data.recipe.val_samples=5"),
    *("data.recipe.test_samples=4", "model.patch_size=8", "model.n_hid=16", "model.n_init=16"),
    *(f"optim.max_steps={UPDATES}", "optim.batch_size=4", "optim.warmup_steps=1", "optim.codebook_start_step=50"),
    *("optim.codebook_start_pictures=16", "callbacks.checkpoint.every_n_steps=5", "trainer.val_check_interval=60"),
    *("trainer.log_every_n_steps=1", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
)
KILL = "+callbacks.kill._target_=killing.KillSometime"


def kill_options(number: int) -> list[str]:
    """The first or the second device, while it trains or while a checkpoint is written."""
    options = [KILL, f"+callbacks.kill.seed={number}", f"+callbacks.kill.rank={number % 2}"]
    if number % 4 < 3:
        options.append(f"+callbacks.kill.after={random.Random(number).choice((0.3, 4.0))}")
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
    assert len(set(steps)) > 5
    done = call(tmp_path, *killed)
    assert done.returncode == 0, done.stderr

    assert read_checkpoint(last)["global_step"] == UPDATES
    assert compare(tmp_path / "killed", tmp_path / "whole") == []
    assert not list((tmp_path / "killed").rglob("*.partial"))
