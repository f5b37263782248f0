"""Stages in two processes that send less, stopped and gone on with; a minute."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from launching import call

from dalle1.checkpoint import load_clip, read_checkpoint, weights_sha256
from dalle1.training.communication import handed_bytes
from dalle1.training.powersgd import PowerSGD

TINY = (
    *("image_size=16", "grid_size=2", "text_vocab_size=300", "text_seq_len=64", "trainer.accelerator=cpu"),
    *("data.recipe.image_size=16", "data.recipe.train_samples=24", "data.recipe.val_samples=4"),
    "data.recipe.test_samples=4",
)
CLIP = (
    *("stage=clip", "model.image_width=16", "model.image_layers=1", "model.text_width=16", "model.text_layers=1"),
    *("model.patch_size=8", "optim.max_steps=8", "optim.warmup_steps=1", "optim.batch_size=2"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.log_every_n_steps=1"),
    # With everything that has a state.
    *("communication=powersgd", "communication.shards=2", "communication.fixed_q=false", "communication.factors=bf16"),
    "+callbacks.weights._target_=killing.NoteWeights",
)
KILL = ("+callbacks.kill._target_=killing.KillAt", "+callbacks.kill.step=4", "+callbacks.kill.rank=1")

pytestmark = pytest.mark.slow


def train(cwd: Path, *arguments: str) -> str:
    done = call(cwd, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(run: Path, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    path = run / "checkpoints" / "powersgd" / f"step0000008-rank000{rank}.pt"
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def test_powersgd_in_two_processes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path, "stage=tokenizer", *TINY)
    for name, extra in (("stopped", KILL), ("stopped", ()), ("whole", ())):
        run = tmp_path / name
        said = train(tmp_path, *CLIP, *TINY, *extra, f"run_dir={run}", f"+callbacks.weights.directory={run}")
        assert "is lost" not in said
        if extra:
            assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5
    whole, stopped = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "stopped"))
    assert stopped["global_step"] == whole["global_step"] == 8
    for part in ("state_dict", "ema"):
        assert weights_sha256(stopped[part]) == weights_sha256(whole[part])
    sha256 = weights_sha256({name.removeprefix("model."): each for name, each in whole["state_dict"].items()})
    for rank in range(2):
        for part in ("errors", "queries"):
            mine, other = (state(tmp_path / name, rank)[part] for name in ("whole", "stopped"))
            assert weights_sha256(mine) == weights_sha256(other)
        # Both processes trained one network.
        assert json.loads((tmp_path / "whole" / f"weights-rank{rank}.json").read_text()) == {"sha256": sha256}

    network = load_clip(tmp_path / "whole" / "checkpoints" / "last.ckpt").model.requires_grad_(True)
    handed = handed_bytes(PowerSGD(shards=2, fixed_q=False, factors="bf16"), network)
    with next((tmp_path / "whole").glob("logs/*/metrics.csv")).open() as file:
        sent = [float(row["perf/sent_megabytes"]) for row in csv.DictReader(file) if row["perf/sent_megabytes"]]
    assert sent == pytest.approx([handed / 1e6] * 8)


def test_other_number_of_processes_goes_on_with_the_mean(tmp_path: Path) -> None:
    train(tmp_path, "stage=tokenizer", *TINY)
    train(tmp_path, *CLIP, *TINY, *KILL, f"run_dir={tmp_path / 'run'}", f"+callbacks.weights.directory={tmp_path}")
    said = train(
        *(tmp_path, *CLIP, *TINY, f"run_dir={tmp_path / 'run'}", f"+callbacks.weights.directory={tmp_path}"),
        "trainer.devices=1",
    )
    assert "of what PowerSGD had not sent on 2 devices, each of 1 gets the mean" in said
