"""The tables of docs/scaling.md, "At scale, on paper": every number again, from `plan` and the formulas of the page."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dalle1.plan import PAPER_BATCH, PAPER_UPDATES, training_of
from dalle1.training.cost import Hardware, Training, count_communication, count_memory, count_seconds
from dalle1.training.powersgd import default_rank
from dalle1.training.run import build

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
# GPUs, optim.batch_size, trainer.accumulate_grad_batches
SCALES = [(8, 16, 8), (64, 16, 1), (512, 2, 1), (1024, 1, 1)]
WAYS = ("plain", "bf16", "powersgd")  # communication=
BYTES_PER_WEIGHT = 16  # of a checkpoint; tests/training/test_cost.py counts them in one
GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419  # Llama 3
WRITES = {"xl": 1e9, "paper_12b": 10e9}  # bytes per second, as the page assumes


@cache
def composed(size: str, *more: str) -> tuple[Training, Hardware]:
    overrides = ["experiment=paper", f"model=transformer_{size}", "trainer.devices=8", "name=test", "run_dir=unused"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("plan", overrides=[*overrides, *(["plan.mfu=0.3"] if size == "paper_12b" else []), *more])
    return training_of(cfg), build(cfg, "plan", Hardware)


def planned(size: str, scale: tuple[int, int, int], *more: str) -> tuple[Training, Hardware]:
    """What the page's commands plan."""
    training, hardware = composed(size, *more)
    gpus, batch_size, passes = scale
    training = replace(training, devices=gpus, batch_size=batch_size, passes=passes)
    assert training.global_batch == PAPER_BATCH
    return training, hardware


def number(value: float) -> str:
    """Two digits below 10, else whole numbers, those above 1000 to three digits."""
    if value < 10:
        return f"{value:#.2g}"
    return f"{value:,.0f}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale[0])
def test_page_has_the_costs_of_a_model_that_fits_under_ddp(scale: tuple[int, int, int]) -> None:
    training, hardware = planned("xl", scale)
    seconds = count_seconds(training, hardware, PAPER_BATCH)
    sent = {way: count_communication(planned("xl", scale, f"communication={way}")[0], sharded=False) for way in WAYS}
    # Sent during the last backward pass, which is two thirds of a pass.
    hidden_at = {way: size / (2 / 3 * seconds / training.passes) for way, size in sent.items()}
    cells = (
        *(f"{each:,}" for each in scale),
        f"{count_memory(training, sharded=False, recompute=False).total / 1e9:.0f}",
        number(seconds),
        number(seconds * PAPER_UPDATES / 86400),
        " / ".join(number(size / 1e9) for size in sent.values()),
        " / ".join(number(rate / 1e9) for rate in hidden_at.values()),
    )
    assert row(*cells) in PAGE, row(*cells)


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale[0])
def test_page_has_the_costs_of_a_model_that_must_be_sharded(scale: tuple[int, int, int]) -> None:
    training, hardware = planned("paper_12b", scale)
    seconds = count_seconds(training, hardware, PAPER_BATCH)
    sent = count_communication(training, sharded=True)
    cells = (
        *(f"{each:,}" for each in scale),
        f"{count_memory(training, sharded=True, recompute=True).total / 1e9:.0f}",
        number(seconds),
        number(seconds * PAPER_UPDATES / 86400),
        number(sent / 1e9),
        number(sent / seconds / 1e9),
    )
    assert row(*cells) in PAGE, row(*cells)
    assert count_memory(training, sharded=False, recompute=True).total > 80e9


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale[0])
def test_page_says_how_often_to_save(scale: tuple[int, int, int]) -> None:
    failure_hours = GPU_HOURS_PER_FAILURE / scale[0]
    cells, lost = [f"{scale[0]:,}", number(failure_hours)], set()
    for size, rate in WRITES.items():
        training, hardware = planned(size, scale)
        write_seconds = BYTES_PER_WEIGHT * training.weights.total / rate
        interval = math.sqrt(2 * write_seconds * failure_hours * 3600)
        lost.add(f"{write_seconds / interval + interval / (2 * failure_hours * 3600):.1%}")
        updates = interval / count_seconds(training, hardware, PAPER_BATCH)
        cells.append(f"{number(interval / 60)} / {number(updates)}")
    assert row(*cells, *lost) in PAGE, row(*cells, *lost)


def test_page_has_the_sizes_of_checkpoints_and_what_powersgd_adds() -> None:
    xl, _ = planned("xl", SCALES[1])
    large, _ = planned("paper_12b", SCALES[1])
    for training in (xl, large):
        assert f"{BYTES_PER_WEIGHT * training.weights.total / 1e9:.0f} GB" in PAGE
    rank = default_rank(xl.model.d_model)
    compressed, _ = planned("xl", SCALES[1], "communication=powersgd")
    extra = 4 * rank / (6 * xl.model.layout.n_states)  # operations for each weight, for one sample in a pass
    assert f"4r / (6 · 1280 · samples) more operations, {extra:.0%} with one sample per GPU and update" in PAGE
    assert f"{compressed.kept_bytes / 1e9:.1f} GB of memory" in PAGE
    assert f"{compressed.handed_bytes / xl.handed_bytes:.0%} of the bytes, " in PAGE
    assert f"{4 * xl.weights.blocks * 64 / 1e9:.0f} GB on 64 GPUs" in PAGE


def test_page_has_the_pace_of_the_largest_runs() -> None:
    on_64, on_512, on_1024 = (count_seconds(*planned("xl", scale), PAPER_BATCH) for scale in SCALES[1:])
    assert f"{PAPER_BATCH / on_64:,.0f}"[:3] == "2,6"
    assert f"{PAPER_BATCH / on_1024:,.0f}"[:2] == "42"
    assert "2,600 for `transformer_xl` on 64 GPUs, 42,000 on 1,024" in PAGE
    assert f"on 512 GPUs\ntake {500 * on_512:.0f} seconds" in PAGE
