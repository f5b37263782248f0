"""The checkpoint that validated best: which it is, what it holds, and that a resumed run knows it."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stage_runs import Train, stop_at_step

from dalle1.checkpoint import load_dvae, read_checkpoint, weights_sha256
from dalle1.training.best_checkpoint import BestCheckpoint

# The dVAE has codes from update 3 on, so the validation after update 2 does not count.
OPTIONS = ("trainer.val_check_interval=2", "callbacks.checkpoint.every_n_steps=5", "~callbacks.pictures")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.training.run.save_curves", lambda *_: None)  # which take as long as the training


@pytest.fixture(scope="module")
def results(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs in which the first validation that counts, and in which the last one is the best."""
    runs = {}
    for name, mode in (("first", "max"), ("last", "min")):
        runs[name] = tmp_path_factory.mktemp(name)
        keep = ("callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=9") if name == "last" else ()
        train(runs[name], "dvae", *OPTIONS, *keep, f"callbacks.best.mode={mode}")
    return runs


def validations(results: Path, metric: str) -> dict[int, float]:
    """Values of a metric by the update that was validated; the last one is validated twice."""
    with (results / "dvae/logs/version_0/metrics.csv").open() as file:
        rows = [(int(row["step"]) + 1, float(row[metric])) for row in csv.DictReader(file) if row.get(metric)]
    return {min(step, 8): value for step, value in rows}


@pytest.mark.parametrize(("run", "choose"), [("first", max), ("last", min)])
def test_best_one_is_kept_and_told(results: dict[str, Path], run: str, choose: Any) -> None:
    values = validations(results[run], "val/nats_per_dim")
    assert sorted(values) == [4, 6, 8]
    step = choose(values, key=values.get)
    assert step == {"first": 4, "last": 8}[run]
    directory = results[run] / "dvae"
    known = json.loads((directory / "checkpoints/best.json").read_text())
    assert known == {"monitor": "val/nats_per_dim", "value": pytest.approx(values[step]), "step": step}
    summary, status = (json.loads((directory / name).read_text()) for name in ("summary.json", "status.json"))
    assert (summary["best_step"], summary["best_nats_per_dim"]) == (step, known["value"])
    assert (status["best_step"], status["best_value"]) == (step, known["value"])
    assert load_dvae(directory / "checkpoints/best.ckpt").step == step


def test_it_is_a_second_name_or_a_file_of_its_own_with_the_same_content(results: dict[str, Path]) -> None:
    directories = {name: path / "dvae" / "checkpoints" for name, path in results.items()}
    assert os.path.samefile(directories["last"] / "best.ckpt", directories["last"] / "step0000008.ckpt")
    # Saved when the averaged weights were in place for a validation, and by the way.
    own, same = (
        read_checkpoint(directories["first"] / "best.ckpt"),
        read_checkpoint(directories["last"] / "step0000004.ckpt"),
    )
    for part in ("state_dict", "ema"):
        assert weights_sha256(own[part]) == weights_sha256(same[part])
    assert weights_sha256(own["ema"]) != weights_sha256(own["state_dict"])


def test_resumed_run_knows_it(
    train: Train, results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dalle1.training.checkpoints.LastCheckpoint.on_train_batch_end", stop_at_step(7))
        with pytest.raises(SystemExit):
            train(tmp_path, "dvae", *OPTIONS, "callbacks.best.mode=max")
    # Gone on from update 5, the checkpoint of which remembers the validation after update 4.
    (tmp_path / "dvae/checkpoints/best.json").unlink()
    summary = train(tmp_path, "dvae", *OPTIONS, "callbacks.best.mode=max")
    whole = json.loads((results["first"] / "dvae/summary.json").read_text())
    assert (summary["best_step"], summary["best_nats_per_dim"]) == (4, whole["best_nats_per_dim"])


def test_metric_that_there_is_not_is_named_with_those_there_are(train: Train, tmp_path: Path) -> None:
    message = r"callbacks\.best\.monitor must be one of the metrics val/.*val/mse.*; got val/fid"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, "dvae", "callbacks.best.monitor=val/fid", "~callbacks.pictures")


def test_equal_and_nan_are_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, saved = BestCheckpoint(str(tmp_path)), []
    monkeypatch.setattr(BestCheckpoint, "_save", lambda self, trainer: saved.append(self.step) or trainer.has_room)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    values = [(1.0, True), (float("nan"), True), (1.0, True), (0.5, False), (0.6, True)]
    for step, (value, has_room) in enumerate(values, 1):
        metrics = {"val/loss": value}
        trainer: Any = SimpleNamespace(callback_metrics=metrics, strategy=strategy, global_step=step, has_room=has_room)
        best.on_validation_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
    # What a full disk did not take is not the best.
    assert saved == [1, 4, 5]
    assert (best.value, best.step) == (0.6, 5)


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"callbacks\.best\.mode must be min or max, got 'least'"):
        BestCheckpoint("run", mode="least")  # type: ignore[arg-type]
