"""Speed is counted from what a sample costs and how long samples take."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stage_runs import Train

from dalle1.data.loader import ResumableLoader
from dalle1.training import throughput
from dalle1.training.stage_module import StageModule
from dalle1.training.throughput import Throughput, matmul_rate


@pytest.mark.parametrize(
    ("seconds", "fastest"),
    [
        ([0.09, 0.04, 0.02, 0.03], 0.02),  # the first one is a warm-up
        ([0.9], 0.9),  # more of these would cost a start a minute
    ],
)
def test_matmul_rate_is_that_of_the_fastest_product(
    monkeypatch: pytest.MonkeyPatch, seconds: list[float], fastest: float
) -> None:
    # The clock is read before and after each product.
    times = iter([time for number, each in enumerate(seconds) for time in (10.0 * number, 10.0 * number + each)])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(times))
    rate = matmul_rate(torch.device("cpu"), torch.float32, side=8, repeats=3)
    assert rate == pytest.approx(2 * 8**3 / fastest)
    assert next(times, None) is None


class _Loader(ResumableLoader):
    """One that has only waited."""

    def __init__(self) -> None:
        self.wait_seconds = 3.0


class _Module(StageModule):
    """With a cost, and without all that training needs."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.flops_per_sample, self.tokens_per_sample = 100, 10
        self.logged: list[tuple[str, float]] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.float32

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        self.logged.append((name, value))


def test_tokens_and_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(throughput, "matmul_rate", lambda *_, **__: 1000.0)
    loader = _Loader()
    trainer: Any = SimpleNamespace(world_size=2, log_every_n_steps=3, global_step=0, train_dataloader=loader)
    module, callback = _Module(), Throughput()
    callback.on_train_start(trainer, module)
    for step in range(1, 7):
        clock[0] += 2.0  # seconds per update of 5 samples on each of 2 devices
        loader.wait_seconds += 0.5
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, {"index": [0] * 5}, step - 1)
        if step == 4:
            clock[0] += 100.0
            loader.wait_seconds += 7.0
            callback.on_validation_start(trainer, module)
    # 5 samples per second: of 10 tokens, and 500 of the 2000 operations per second that both devices could make. The
    # pause is no part of it, and after it the clock starts with the next update.
    of_data = [("perf/samples_per_second", 5.0), ("perf/data_wait", 0.25)]
    assert module.logged == [*of_data, ("perf/tokens_per_second", 50.0), ("perf/mfu", 0.25)] * 2


def test_stages_without_a_cost_log_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 3.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(times))
    module = _Module()
    module.flops_per_sample = 0
    trainer: Any = SimpleNamespace(world_size=1, log_every_n_steps=1, global_step=1, train_dataloader=_Loader())
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for _ in range(2):
        callback.on_train_batch_end(trainer, module, None, {"index": [0]}, 0)
    assert module.logged == [("perf/samples_per_second", 0.5), ("perf/data_wait", 0.0)]


def test_a_transformer_run_logs_its_speed(train: Train, trained: Path, tmp_path: Path) -> None:
    for stage in ("tokenizer", "dvae"):
        (tmp_path / stage).symlink_to(trained / stage)
    train(tmp_path, "transformer", "trainer.log_every_n_steps=2")
    with next((tmp_path / "transformer").glob("logs/*/metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["perf/mfu"]]
    assert rows
    assert all(float(row["perf/tokens_per_second"]) > 0 and 0 < float(row["perf/mfu"]) < 1 for row in rows)
