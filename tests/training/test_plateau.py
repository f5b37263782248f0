"""When the learning rate is halved."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.checkpoint import read_checkpoint, weights_sha256
from dalle1.training.optim import OptimConfig
from dalle1.training.plateau import PlateauHalving

PAPER = {"lr": 4.5e-4, "final_lr": 1.40625e-5}
PLATEAU = {"lr_schedule": "plateau", "plateau_window": 2, "plateau_patience": 3, "plateau_threshold": 0.1}
# The second window must be better by nine tenths: the rate is halved after it, at update 7.
IMPATIENT = (
    *("optim.lr_schedule=plateau", "optim.plateau_window=3", "optim.plateau_patience=1"),
    *("optim.plateau_threshold=0.9", "callbacks.checkpoint.every_n_steps=3", "trainer.val_check_interval=8"),
)


@pytest.fixture
def make_plateau(optim_numbers: dict[str, Any]) -> Callable[..., PlateauHalving]:
    """A schedule of one rank with windows of 2 updates; keywords override the configuration."""

    def make(mean_over_ranks: Callable[[Tensor], Tensor] = lambda value: value, **options: object) -> PlateauHalving:
        numbers = optim_numbers | PAPER | PLATEAU | {"warmup_steps": 0, "max_steps": 1000}
        config = OptimConfig(**(numbers | options))
        return PlateauHalving(config, mean_over_ranks)

    return make


def shares(plateau: PlateauHalving, losses: list[float]) -> list[float]:
    """Share of the peak after each of these losses."""
    seen = []
    for loss in losses:
        plateau.add(torch.tensor(loss))
        plateau.end_update()
        seen.append(plateau.share)
    return seen


def test_halves_after_as_many_windows_without_an_improvement_as_it_has_patience(
    make_plateau: Callable[..., PlateauHalving],
) -> None:
    # Windows of 3, 2, then four that are not a tenth below 2.
    losses = [2.0, 4.0, 2.0, 2.0, 1.9, 1.9, 1.8, 1.85, 3.0, 1.0, 2.0, 2.0]
    assert shares(make_plateau(), losses) == [1.0] * 9 + [0.5] * 3


def test_bad_update_is_in_no_window(make_plateau: Callable[..., PlateauHalving]) -> None:
    plateau = make_plateau()
    losses = [2.0, 4.0, 2.0, 2.0, 1.9, float("nan"), 1.9, 1.8, 1.85, 3.0, 1.0]
    seen = []
    for loss in losses:
        plateau.add(torch.tensor(loss))
        if loss != loss:
            plateau.drop_update()
        plateau.end_update()
        seen.append(plateau.share)
    # As without it, an update later: see the test above.
    assert seen == [1.0] * 10 + [0.5]
    assert plateau.state_dict()["updates"] == 10


def test_improvement_renews_its_patience(make_plateau: Callable[..., PlateauHalving]) -> None:
    windows = [1.0, 1.0, 1.0, 0.8, 0.8, 0.8, 0.8]
    assert shares(make_plateau(plateau_window=1), windows) == [1.0] * 6 + [0.5]


def test_five_halvings_end_at_the_papers_last_rate(make_plateau: Callable[..., PlateauHalving]) -> None:
    plateau = make_plateau(plateau_window=1)
    seen = shares(plateau, [1.0] * 50)
    assert list(dict.fromkeys(seen)) == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])
    assert seen.index(seen[-1]) + 1 == 1 + 5 * 3
    assert seen[-1] * PAPER["lr"] == pytest.approx(PAPER["final_lr"])


def test_last_rate_need_not_be_a_power_of_two(make_plateau: Callable[..., PlateauHalving]) -> None:
    seen = shares(make_plateau(plateau_window=1, plateau_patience=1, lr=1.0, final_lr=0.3), [1.0] * 9)
    assert list(dict.fromkeys(seen)) == [1.0, 0.5, 0.3]


def test_loss_may_be_negative(make_plateau: Callable[..., PlateauHalving]) -> None:
    falling = [-1.0 * 1.2**n for n in range(20)]
    assert shares(make_plateau(plateau_window=1), falling)[-1] == 1
    rising = [-2.0, -1.9, -1.8, -1.7]
    assert shares(make_plateau(plateau_window=1), rising)[-1] == 0.5


def test_warm_up_is_not_watched(make_plateau: Callable[..., PlateauHalving]) -> None:
    plateau = make_plateau(plateau_window=1, warmup_steps=10)
    # The best window would be one of the warm-up.
    assert shares(plateau, [0.1] * 10 + [9.0, 8.0, 7.0, 6.0, 5.0]) == [1.0] * 15


def test_parts_of_an_accumulated_update_are_one_update(make_plateau: Callable[..., PlateauHalving]) -> None:
    whole, parts = make_plateau(), make_plateau()
    for loss in (4.0, 3.0, 4.0):
        whole.add(torch.tensor(loss))
        parts.add(torch.tensor(loss / 4))
        parts.add(torch.tensor(3 * loss / 4))
        whole.end_update()
        parts.end_update()
    assert parts.state_dict() == whole.state_dict()


def test_ranks_decide_alike_on_their_mean(make_plateau: Callable[..., PlateauHalving]) -> None:
    # One rank's loss rises, the other's falls by more: together they improve.
    ranks = [[1.0, 1.3, 1.6, 1.9, 2.2], [9.0, 7.0, 5.0, 4.0, 3.0]]
    means = iter([sum(losses) / 2 for losses in zip(*ranks, strict=True)])
    together = make_plateau(lambda value: torch.tensor(next(means)), plateau_window=1)
    assert shares(together, ranks[0])[-1] == 1
    assert shares(make_plateau(plateau_window=1), ranks[0])[-1] == 0.5


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_continues_from_its_state(make_plateau: Callable[..., PlateauHalving], stop: int) -> None:
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first, second = make_plateau(), make_plateau(), make_plateau()
    expected = shares(whole, losses)
    shares(first, losses[:stop])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert shares(second, losses[stop:]) == expected[stop:]
    assert second.state_dict() == whole.state_dict()
    assert expected[-1] < 1


def test_resumed_run_equals_uninterrupted_one_and_logs_its_rate(
    train: Callable[..., Any], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dalle1.training.checkpoints import LastCheckpoint

    work = LastCheckpoint.on_train_batch_end

    def die_after_update_6(self: Any, trainer: Any, *rest: Any) -> None:
        work(self, trainer, *rest)
        if trainer.global_step == 6:
            raise SystemExit(1)

    for run in ("whole", "resumed"):
        shutil.copytree(trained / "tokenizer", tmp_path / run / "tokenizer")
    train(tmp_path / "whole", "clip", *IMPATIENT)
    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", die_after_update_6)
        with pytest.raises(SystemExit):
            train(tmp_path / "resumed", "clip", *IMPATIENT)
    train(tmp_path / "resumed", "clip", *IMPATIENT)

    whole, resumed = (
        read_checkpoint(tmp_path / name / "clip" / "checkpoints" / "last.ckpt") for name in ("whole", "resumed")
    )
    assert resumed["plateau"] == whole["plateau"]
    assert whole["plateau"]["halvings"] == 1
    assert weights_sha256(resumed["state_dict"]) == weights_sha256(whole["state_dict"])
    with open(tmp_path / "whole" / "clip" / "logs" / "version_0" / "metrics.csv", newline="") as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
    assert rates == pytest.approx([2e-3] * 7 + [1e-3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plateau_window": 5}, "plateau_window must be 0 with optim.lr_schedule=cosine, got 5"),
        (PLATEAU | {"plateau_window": 0}, "plateau_window must be >= 1 with optim.lr_schedule=plateau, got 0"),
        (PLATEAU | {"plateau_patience": 0}, "plateau_patience must be >= 1 with optim.lr_schedule=plateau, got 0"),
        (PLATEAU | {"plateau_threshold": 1.0}, r"plateau_threshold must be in \[0, 1\), got 1.0"),
        (PLATEAU | {"final_lr": 0.0}, "final_lr must be > 0 with optim.lr_schedule=plateau, got 0"),
        (PLATEAU | {"decay_steps": 5}, "decay_steps must be 0 with optim.lr_schedule=plateau, got 5"),
        ({"lr_schedule": "linear"}, "lr_schedule must be one of cosine, plateau, got 'linear'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    optim_numbers: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**(optim_numbers | PAPER | options))
