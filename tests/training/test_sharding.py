"""Training with a part of the network on each device: the same numbers, and checkpoints for any number of devices."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import Train, TrainScript, last

from dalle1.checkpoint import DamagedCheckpointError, load_transformer, read_checkpoint
from dalle1.export import export
from dalle1.sharded_files import read_sharded
from dalle1.training.checkpoints import newest_whole
from dalle1.training.sharded_checkpoints import point_to

UPDATES = 20
# Everything that a run of the transformer can have. With a small eps Adam makes as much of a gradient's rounding error
# as of a gradient.
OPTIONS = (
    *(f"optim.max_steps={UPDATES}", "optim.eps=1e-2", "optim.variance_clip=5", "optim.grad_clip_norm=0.5"),
    *("optim.ema_interval=2", "optim.start_from_codebook=true", "optim.cache_image_tokens=false"),
    *("optim.caption_dropout=0", "trainer.val_check_interval=2", "+trainer.accumulate_grad_batches=2"),
    *("callbacks.checkpoint.every_n_steps=10", "compute.activation_checkpointing=true"),
)
PICTURES = "callbacks.pictures.n_samples=1"
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
    train_script(results, "transformer", *OPTIONS, *TWO, "~callbacks.pictures")
    return results


def test_losses_are_those_of_one_process(whole: Path, train: Train, trained: Path, tmp_path: Path) -> None:
    summary = train(started(trained, tmp_path), "transformer", *OPTIONS, *ONE, "~callbacks.pictures")
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
    # Pictures, which the first device draws, change nothing.
    said = train_script(results, "transformer", *OPTIONS, *TWO, PICTURES, *kill)
    assert "SIGTERM has stopped 'transformer' after update 13, which is saved" in said
    assert last(results, "transformer").readlink() == Path("step0000013.ckpt")
    assert "from step 13" in train_script(results, "transformer", *OPTIONS, *TWO, PICTURES)
    assert (results / "transformer" / "pictures" / f"samples-step{UPDATES:07d}.png").is_file()
    expected = tensors_of(read_sharded(last(whole, "transformer")))
    resumed = tensors_of(read_sharded(last(results, "transformer")))
    n_weights = sum(name.startswith("/ema/") for name in expected)
    # Weights, average and two moments of each, and how many updates Adam has made.
    assert len(expected) == 5 * n_weights
    assert resumed.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(resumed[name], tensor)]
    assert not different


def test_checkpoints_are_directories_that_stay_by_number(whole: Path) -> None:
    directory = last(whole, "transformer").parent
    assert sorted(path.name for path in directory.iterdir()) == [
        "best.ckpt",
        "best.json",
        "last.ckpt",
        "step0000010.ckpt",
        "step0000020.ckpt",
    ]
    for name in ("last.ckpt", "best.ckpt"):
        assert (directory / name).readlink() == Path("step0000020.ckpt")
    files = json.loads((last(whole, "transformer") / "manifest.json").read_text())["files"]
    there = {path.name for path in last(whole, "transformer").iterdir()}
    assert there == {"manifest.json", *files}
    # Of each device weights, averages and two moments, and what is not sharded.
    assert len(files) == 2 * 4 + 1


def test_link_that_moves_on_takes_its_own_directory_away_and_no_other(tmp_path: Path) -> None:
    for name in ("step0000004.ckpt", "best-step0000006.ckpt", "best-step0000008.ckpt"):
        (tmp_path / name).mkdir()
        point_to(tmp_path / "best.ckpt", tmp_path / name)
        assert (tmp_path / "best.ckpt").readlink() == Path(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("best-step0000008.ckpt", "best.ckpt", "step0000004.ckpt")
    ]


def test_one_process_goes_on_from_two_and_two_numbers_stay(
    whole: Path, train: Train, trained: Path, tmp_path: Path
) -> None:
    results = copied(whole, trained, tmp_path)
    more = ("optim.max_steps=22", "callbacks.checkpoint.every_n_steps=22")
    before = tensors_of(read_sharded(last(results, "transformer")))
    assert train(results, "transformer", *OPTIONS, *ONE, *more)["step"] == 22
    names = sorted(path.name for path in last(results, "transformer").parent.iterdir())
    assert names[2:] == ["last.ckpt", "step0000020.ckpt", "step0000022.ckpt"]
    after = tensors_of(read_checkpoint(last(results, "transformer")))
    assert {name: each.shape for name, each in after.items()} == {name: each.shape for name, each in before.items()}
    steps = [float(each) for name, each in after.items() if name.endswith("/step")]
    assert set(steps) == {22.0}


def copied(whole: Path, trained: Path, directory: Path) -> Path:
    """A run of two devices that a test may change."""
    results = started(trained, directory)
    shutil.copytree(whole / "transformer", results / "transformer", symlinks=True)
    return results


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no manifest"])
def test_damaged_one_is_named_and_the_one_before_it_is_found(
    whole: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = last(copied(whole, trained, tmp_path), "transformer")
    file = sorted(path.glob("shard-00002-*"))[1]
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "gone":
        file.unlink()
    else:
        (path / "manifest.json").unlink()
    found = newest_whole(path.parent)
    assert found is not None
    assert (found[0].name, found[1]["global_step"]) == ("step0000010.ckpt", 10)
    assert f"'{path}' is damaged; going on from '{found[0]}'" in caplog.messages
    if damage in ("cut", "gone"):
        with pytest.raises(DamagedCheckpointError, match=r"is damaged: .shard-00002-.*; delete it, or copy it again"):
            load_transformer(path)


def test_network_is_read_without_the_optimizer(whole: Path) -> None:
    path = last(whole, "transformer")
    everything, content = read_sharded(path), read_checkpoint(path)
    assert content["state_dict"] == {}, "all weights have an average"
    assert not any("exp_avg" in name for name in tensors_of(content))
    weights = load_transformer(path).model.state_dict()
    for name, average in everything["ema"].items():
        assert torch.equal(weights[name], average)
        assert not torch.equal(weights[name], everything["state_dict"][f"model.{name}"]) or not average.any()


def test_export_is_the_average_in_one_file(whole: Path, tmp_path: Path) -> None:
    export(whole / "transformer", tmp_path / "out")
    assert load_transformer(tmp_path / "out").sha256 == load_transformer(last(whole, "transformer")).sha256


def test_another_run_does_not_go_on_from_it(whole: Path, train: Train, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another optim.lr \(0.004, not 0.001\)"):
        train(copied(whole, trained, tmp_path), "transformer", *OPTIONS, *ONE, "optim.lr=1e-3")


@pytest.mark.parametrize(
    ("stage", "option", "message"),
    [
        ("dvae", "optim.max_steps=4", "trainer=fsdp must be for stage=transformer, .* got stage=dvae; use trainer=ddp"),
        ("clip", "optim.max_steps=4", "trainer=fsdp must be for stage=transformer, .* got stage=clip; use trainer=ddp"),
        (
            "transformer",
            "optim.resblock_gradient_scaling=true",
            "resblock_gradient_scaling must be false with trainer=fsdp",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    train: Train, trained: Path, tmp_path: Path, stage: str, option: str, message: str
) -> None:
    results = started(trained, tmp_path)
    if stage == "dvae":
        shutil.rmtree(results / "dvae")
    with pytest.raises(ValueError, match=message):
        train(results, stage, option, *TWO[:3])
    assert not (results / stage).exists()
