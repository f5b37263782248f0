"""Training with a part of the network on each device: the same numbers, and checkpoints for any number of devices."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import Train, TrainScript, last

from dalle1.sharded_files import read_sharded

UPDATES = 20
# Everything that a run of the transformer can have. With a small eps Adam makes as much of a gradient's rounding error
# as of a gradient.
OPTIONS = (
    *(f"optim.max_steps={UPDATES}", "optim.eps=1e-2", "optim.variance_clip=5", "optim.grad_clip_norm=0.5"),
    *("optim.ema_interval=2", "optim.start_from_codebook=true", "optim.cache_image_tokens=false"),
    *("optim.caption_dropout=0", "trainer.val_check_interval=2", "+trainer.accumulate_grad_batches=2"),
    *("callbacks.checkpoint.every_n_steps=10", "compute.activation_checkpointing=true"),
)
TWO = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "optim.batch_size=2")
ONE = ("optim.batch_size=4",)


def started(trained: Path, directory: Path) -> Path:
    """A directory with the stages that a transformer needs."""
    for stage in ("tokenizer", "dvae"):
        shutil.copytree(trained / stage, directory / stage)
    return directory


def logged(results: Path, *names: str) -> dict[str, list[float]]:
    """Numbers of metrics.csv, of all starts."""
    numbers: dict[str, list[float]] = {name: [] for name in names}
    for path in sorted(results.glob("transformer/logs/*/metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name in names:
                    if row.get(name):
                        numbers[name].append(float(row[name]))
    return numbers


@pytest.fixture(scope="module")
def whole(train_script: TrainScript, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty updates on two devices."""
    results = started(trained, tmp_path_factory.mktemp("whole"))
    train_script(results, "transformer", *OPTIONS, *TWO)
    return results


def test_losses_are_those_of_one_process(whole: Path, train: Train, trained: Path, tmp_path: Path) -> None:
    summary = train(started(trained, tmp_path), "transformer", *OPTIONS, *ONE)
    names = ("val/loss", "val/image_nats_per_token", "train/grad_norm", "train/lr")
    sharded, expected = logged(whole, *names), logged(tmp_path, *names)
    for name in names:
        assert len(expected[name]) >= UPDATES
        assert sharded[name] == pytest.approx(expected[name], rel=1e-5), name
    assert json.loads((whole / "transformer" / "summary.json").read_text())["loss"] == pytest.approx(summary["loss"])


def tensors_of(content: Any, place: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dicts and lists, by where they are."""
    if isinstance(content, torch.Tensor):
        return {place: content}
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return {name: each for key, value in items for name, each in tensors_of(value, f"{place}/{key}").items()}


def test_stopped_run_goes_on_as_if_it_had_not_been(
    whole: Path, train_script: TrainScript, trained: Path, tmp_path: Path
) -> None:
    results = started(trained, tmp_path)
    kill = ("+callbacks.kill._target_=killing.KillAt", "+callbacks.kill.step=12", "+callbacks.kill.rank=1")
    said = train_script(results, "transformer", *OPTIONS, *TWO, *kill)
    assert "SIGTERM has stopped 'transformer' after update 13, which is saved" in said
    assert last(results, "transformer").readlink() == Path("step0000013.ckpt")
    assert "from step 13" in train_script(results, "transformer", *OPTIONS, *TWO)
    expected = tensors_of(read_sharded(last(whole, "transformer")))
    resumed = tensors_of(read_sharded(last(results, "transformer")))
    n_weights = sum(name.startswith("/ema/") for name in expected)
    # Weights, average and two moments of each, and how many updates Adam has made.
    assert len(expected) == 5 * n_weights
    assert resumed.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(resumed[name], tensor)]
    assert not different
