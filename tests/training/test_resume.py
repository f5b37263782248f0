"""Runs that were stopped, have ended, or are started again with other options."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import STAGES, Train, last, stop_at_step

from dalle1.checkpoint import load_transformer, read_checkpoint, weights_sha256


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "wall_seconds"}


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(
    train: Train, trained: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for earlier in ("tokenizer", "dvae"):
        if earlier != stage:
            shutil.copytree(trained / earlier, tmp_path / earlier)
    save, saved = torch.save, []

    def stop_after_first(content: object, file: object) -> None:
        save(content, file)
        saved.append(content)
        if len(saved) == 1:
            raise KeyboardInterrupt

    # The process dies right after the checkpoint of step 4, before its file has its name.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop_after_first)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            train(tmp_path, stage)
    assert not last(tmp_path, stage).exists()
    with monkeypatch.context() as patch:
        patch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_end", stop_at_step(6))
        with pytest.raises(SystemExit):
            train(tmp_path, stage)
    assert read_checkpoint(last(tmp_path, stage))["global_step"] == 4

    summary = train(tmp_path, stage)

    assert timeless(summary) == timeless(json.loads((trained / stage / "summary.json").read_text()))
    whole, resumed = read_checkpoint(last(trained, stage)), read_checkpoint(last(tmp_path, stage))
    assert resumed["global_step"] == whole["global_step"] == 8
    assert resumed["callbacks"] == whole["callbacks"]
    for part in ("state_dict", "ema"):
        assert weights_sha256(resumed[part]) == weights_sha256(whole[part])
    for mine, other in zip(resumed["optimizer_states"], whole["optimizer_states"], strict=True):
        for name, state in other["state"].items():
            assert torch.equal(mine["state"][name]["exp_avg_sq"], state["exp_avg_sq"])


def test_resumed_run_with_scaled_resblocks_equals_uninterrupted_one(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("whole", "resumed"):
        for earlier in ("tokenizer", "dvae"):
            shutil.copytree(trained / earlier, tmp_path / run / earlier)
    train(tmp_path / "whole", "transformer", "optim.resblock_gradient_scaling=true")
    with monkeypatch.context() as patch:
        patch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_end", stop_at_step(6))
        with pytest.raises(SystemExit):
            train(tmp_path / "resumed", "transformer", "optim.resblock_gradient_scaling=true")
    train(tmp_path / "resumed", "transformer", "optim.resblock_gradient_scaling=true")
    whole, resumed = (
        read_checkpoint(last(tmp_path / run, "transformer"))["state_dict"] for run in ("whole", "resumed")
    )
    assert weights_sha256(resumed) == weights_sha256(whole)
    # Two resblocks in each of three layers, grown eight times.
    assert whole["scaling.scales"].tolist() == pytest.approx(6 * [2 ** (13 + 8 / 1000)])
    logged = (tmp_path / "whole" / "transformer" / "logs" / "version_0" / "metrics.csv").read_text()
    for name in ("resblock_scale_min", "resblock_scale_max", "skipped_updates"):
        assert f"train/{name}" in logged
    assert load_transformer(last(tmp_path / "whole", "transformer")).step == 8


@pytest.mark.parametrize("moment", ["on_train_batch_start", "on_validation_batch_start"])
def test_ctrl_c_is_not_an_error_of_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    def press(self: object, trainer: Any, *_: object) -> None:
        # In validation: of the last step, after training.
        if moment == "on_train_batch_start" or trainer.state.fn == "validate":
            raise KeyboardInterrupt

    monkeypatch.setattr(f"dalle1.training.checkpoints.LastCheckpoint.{moment}", press)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "dvae")
    assert capsys.readouterr().err.endswith("\n"), "what is printed next begins a line"


def test_wall_time_of_earlier_starts_counts(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    content = read_checkpoint(last(tmp_path, "dvae"))
    assert 0 < content["wall_seconds"] < 1000
    torch.save(content | {"wall_seconds": 5000.0}, last(tmp_path, "dvae"))
    assert train(tmp_path, "dvae", "optim.max_steps=9")["wall_seconds"] > 5000


def test_count_of_cut_captions_survives_a_resume(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["text_seq_len=3", "truncate_captions=true"]
    train(tmp_path, "tokenizer", *short)
    monkeypatch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_end", stop_at_step(6))
    with pytest.raises(SystemExit):
        train(tmp_path, "clip", *short)
    # The first 4 steps are in the checkpoint, 4 more follow: 32 of the 40 training samples.
    monkeypatch.undo()
    assert train(tmp_path, "clip", *short)["cut_captions"] == 32 + 8


def test_finished_stage_is_left_alone(train: Train, trained: Path) -> None:
    before = last(trained, "dvae").stat().st_mtime_ns
    summary = (trained / "dvae" / "summary.json").read_text()
    assert train(trained, "dvae") == json.loads(summary)
    assert last(trained, "dvae").stat().st_mtime_ns == before
    assert (trained / "dvae" / "summary.json").read_text() == summary


def test_run_goes_on_when_more_steps_are_asked_for(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "dvae", tmp_path / "dvae")
    assert train(tmp_path, "dvae", "optim.max_steps=10")["step"] == 10


def test_run_of_another_model_is_refused(train: Train, trained: Path) -> None:
    expected = r"another model.n_hid \(16, not 32\) and another model.n_init \(16, not 32\); delete that run, or choose"
    with pytest.raises(ValueError, match=expected):
        train(trained, "dvae", "model.n_hid=32", "model.n_init=32")


def test_run_of_another_kind_is_refused(train: Train, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(trained / "dvae", tmp_path / "clip")
    with pytest.raises(ValueError, match="must hold a clip, got a dvae; choose another name="):
        train(tmp_path, "clip")


def test_interrupted_run_with_fewer_steps_is_refused(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    with monkeypatch.context() as patch:
        patch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_end", stop_at_step(6))
        with pytest.raises(SystemExit):
            train(tmp_path, "clip")
    with pytest.raises(ValueError, match=r"optim.max_steps must be at least 4, where .* was interrupted, got 3"):
        train(tmp_path, "clip", "optim.max_steps=3")
    assert not (tmp_path / "clip" / "summary.json").exists()


def test_end_of_training_is_saved_without_the_callback_too(train: Train, tmp_path: Path) -> None:
    train(tmp_path, "dvae", "~callbacks.checkpoint", "optim.max_steps=7")
    assert read_checkpoint(last(tmp_path, "dvae"))["global_step"] == 7


def test_continued_run_logs_where_it_would_have(train: Train, trained: Path, tmp_path: Path) -> None:
    for earlier in ("tokenizer", "dvae", "transformer"):
        shutil.copytree(trained / earlier, tmp_path / earlier)
    train(tmp_path, "transformer", "optim.max_steps=12")
    with (tmp_path / "transformer" / "logs" / "version_1" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/lr"]] == ["8", "9", "10", "11"]
    # Its first batch starts the clock.
    assert [row["step"] for row in rows if row["perf/mfu"]] == ["9", "10", "11"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=1e-4", r"another optim.lr \(0.003, not 0.0001\)"),
        ("optim.kl_weight=9", r"another optim.kl_weight \(.*, not 9\)"),
        ("data.seed=5", r"another data.seed \(0, not 5\)"),
        (("data.augmentation=dvae", "data.cache_images=false"), r"another data.augmentation \(none, not dvae\)"),
        ("data.background=red", r"another data.background \(white, not red\)"),
        ("data.caption=lines", r"another data.caption \(text, not lines\)"),
        ("filters.min_side=4", r"another data.filters \(min_side: None, not 4\)"),
        ("data.small_pictures=refuse", r"another data.small_pictures \(enlarge, not refuse\)"),
        (
            "data.train=elsewhere/mine-*.tar",
            r"another data.train \(\[\['train-\*.tar', 1.0\]\], not \[\['mine-\*.tar', 1.0\]\]\)",
        ),
    ],
)
def test_run_with_other_options_is_refused(
    train: Train, trained: Path, override: str | tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(trained, "dvae", *([override] if isinstance(override, str) else override))
