"""Pictures encoded once: the same training, other dVAEs refused, stopped and gone on with, several devices."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_runs import Train, last

from dalle1.checkpoint import load_image_tokenizer, read_checkpoint, weights_sha256
from dalle1.data.augmentation import augment_file
from dalle1.data.shards import ShardIndex
from dalle1.data.transforms import to_unit_interval
from dalle1.training import tokens_stage

# Ten epochs of 40 samples in batches of 4 would have ten draws; 8 updates see the first one alone, so these have three.
STEPS = ("optim.max_steps=26", "optim.batch_size=4", "optim.cache_image_tokens=false")
AUGMENTED = ("data.augmentation=transformer", "data.cache_images=false")


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    """Results of the first two stages."""
    for stage in ("tokenizer", "dvae"):
        shutil.copytree(trained / stage, tmp_path / stage)
    return tmp_path


def test_tokens_are_those_of_the_crops_of_each_epoch(train: Train, results: Path, shapes: Path) -> None:
    summary = train(results, "tokens", "stage.crops=3", "data.seed=5", *AUGMENTED)
    assert summary["pictures"] == {"train": 40, "val": 8}
    assert (summary["bad_samples"], summary["tokens"]) == (0, 16 * (40 * 3 + 8))
    assert summary["pictures_per_second"] > 0
    tokenizer = load_image_tokenizer(last(results, "dvae"))
    source, tokens = (ShardIndex(f"{place}/train-*.tar") for place in (shapes, results / "tokens"))
    for i in (0, 17, 39):
        crops = [
            augment_file(source[i].image(), "transformer", image_size=16, seed=5, epoch=draw, key=i)
            for draw in range(3)
        ]
        expected = tokenizer.encode(to_unit_interval(torch.stack(crops)))
        assert np.array_equal(tokens[i].image_tokens(), expected.numpy())
        assert (tokens[i].key, tokens[i].text()) == (source[i].key, source[i].text())
        assert tokens[i].metadata() == source[i].metadata()


@pytest.mark.parametrize("extra", [(), AUGMENTED], ids=["centred", "augmented"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_from_tokens_equals_training_from_pictures(
    train: Train, results: Path, extra: tuple[str, ...], num_workers: int
) -> None:
    train(results, "tokens", f"stage.crops={3 if extra else 1}", *extra)
    steps = (*STEPS, f"data.num_workers={num_workers}", *extra)
    train(results, "transformer", *steps, f"run_dir={results}/pictures")
    tokens = [f"data.tokens={results}/tokens", "data.train=null", "data.val=null"]
    train(results, "transformer", *steps, *tokens, f"run_dir={results}/cached")
    curves = []
    for run in ("pictures", "cached"):
        content = read_checkpoint(results / run / "checkpoints" / "last.ckpt")
        log = (results / run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
        names = log[0].split(",")
        rows = [dict(zip(names, line.split(","), strict=True)) for line in log[1:]]
        losses = [row["train/loss"] for row in rows if row["train/loss"]]
        curves.append(
            (losses, [row["val/loss"] for row in rows if row["val/loss"]], weights_sha256(content["state_dict"]))
        )
    assert len(curves[0][0]) == 26
    assert curves[0] == curves[1]


def test_tokens_of_another_dvae_are_refused(train: Train, results: Path) -> None:
    train(results, "tokens")
    manifest = json.loads((results / "tokens" / "tokens.json").read_text())
    (results / "tokens" / "tokens.json").write_text(json.dumps(manifest | {"dvae_sha256": "cd" * 32}))
    tokens = f"data.tokens={results}/tokens"
    with pytest.raises(
        ValueError, match=r"data\.tokens must be those of this dVAE, [0-9a-f]{12}, got those of cdcdcdcdcdcd"
    ):
        train(results, "transformer", tokens)
    with pytest.raises(
        ValueError, match=r"holds tokens with another dvae_sha256 .*; delete it, or choose another name="
    ):
        train(results, "tokens")
    (results / "tokens" / "tokens.json").write_text(json.dumps(manifest | {"image_size": 32}))
    with pytest.raises(ValueError, match=r"must be of pictures of 16 pixels, got 32; set image_size=32"):
        train(results, "transformer", tokens)
    with pytest.raises(ValueError, match=r"data\.tokens are for stage=transformer.*got stage=clip"):
        train(results, "clip", tokens)


def test_stopped_encoding_goes_on_with_the_shards_that_are_missing(
    train: Train, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = tokens_stage.write_token_shard, []

    def stop_after_first(path: Path, samples: Any) -> int:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, samples)

    with monkeypatch.context() as patched:
        patched.setattr(tokens_stage, "write_token_shard", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            train(results, "tokens")
    assert sorted(path.name for path in (results / "tokens").iterdir()) == ["tokens.json", "train-00000.tar"]
    with pytest.raises(ValueError, match=r"lacks 1 of 1 shards of val"):
        train(results, "transformer", f"data.tokens={results}/tokens")
    before = written[0].stat().st_mtime_ns
    assert train(results, "tokens")["pictures"] == {"train": 40, "val": 8}
    assert written[0].stat().st_mtime_ns == before
    summary = (results / "tokens" / "summary.json").read_text()
    assert train(results, "tokens") == json.loads(summary)
    assert (results / "tokens" / "summary.json").read_text() == summary


def test_devices_encode_every_other_shard(train: Train, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(results, "tokens")
    whole = {path.name: path.read_bytes() for path in (results / "tokens").glob("*.tar")}
    shutil.rmtree(results / "tokens")

    class Device:
        device, world_size = torch.device("cpu"), 2

        def __init__(self, rank: int) -> None:
            self.global_rank, self.is_global_zero = rank, rank == 0

        def launch(self) -> None:
            pass

        def barrier(self) -> None:
            pass

    # The first device waits for the second, which works meanwhile.
    def wait(_: float) -> None:
        monkeypatch.setattr(tokens_stage, "build_fabric", lambda _: Device(1))
        assert train(results, "tokens") == {}

    monkeypatch.setattr(tokens_stage.time, "sleep", wait)
    monkeypatch.setattr("dalle1.training.run.build_fabric", lambda _: devices.pop(0))
    devices = [Device(0), Device(1)]
    assert train(results, "tokens")["pictures"] == {"train": 40, "val": 8}
    assert {path.name: path.read_bytes() for path in (results / "tokens").glob("*.tar")} == whole


def test_bad_pictures_are_left_out_and_counted(train: Train, results: Path, shapes: Path) -> None:
    bad = results / "bad.tar"
    with tarfile.open(bad, "w") as tar:
        for name, content in (("1.png", b"broken"), ("2.txt", b"no picture")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    places = f"data.train=[{shapes}/train-00000.tar,{bad}]"
    with pytest.raises(
        ValueError, match=r"picture of sample '1' in '.*bad\.tar' cannot be decoded .*on_bad_sample=skip"
    ):
        train(results, "tokens", places)
    summary = train(results, "tokens", places, "data.on_bad_sample=skip")
    assert (summary["pictures"]["train"], summary["bad_samples"]) == (40, 2)
    assert summary["damaged_shards"] == 0
    with pytest.raises(ValueError, match=r"at most 0\.01 of the samples may be bad .*, got 2 of 50; mend the data"):
        train(results, "tokens", places, "data.on_bad_sample=skip", "data.max_bad_fraction=0.01")
    used = train(results, "transformer", f"data.tokens={results}/tokens")
    assert used["bad_samples"] == 0


def test_damaged_shards_are_counted_and_what_is_whole_of_them_is_encoded(
    train: Train, results: Path, shapes: Path
) -> None:
    cut = results / "cut.tar"
    whole = (shapes / "train-00000.tar").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    summary = train(
        results, "tokens", f"data.train=[{shapes}/train-*.tar,{cut},{results}/gone.tar]", "data.on_bad_sample=skip"
    )
    assert summary["damaged_shards"] == 2
    assert 40 < summary["pictures"]["train"] < 80


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stage.crops=0",), r"stage\.crops must be >= 1, got 0"),
        (("stage.batch_size=x",), r"stage\.batch_size must be an integer >= 1, got 'x'"),
        (("stage.crops=2",), r"stage\.crops must be 1 without augmentation.*got 2; set data\.augmentation=transformer"),
        (
            ("data.train=https://h/a.tar", "data.cache_images=false"),
            r"needs shards on this machine, got data\.train else",
        ),
        (("dvae=gone.ckpt",), r"stage=tokens needs a trained dVAE, there is none at 'gone\.ckpt'"),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    train: Train, results: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        train(results, "tokens", *overrides)
    assert not (results / "tokens").exists()
