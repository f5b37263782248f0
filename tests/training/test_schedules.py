"""Check values of the paper's schedules (app. A.2) and the shape of the learning rate."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dalle1.training.optim import OptimConfig
from dalle1.training.schedules import cosine, warmup_cosine
from dalle1.training.stage_module import derive_seed

NUMBERS = {
    "batch_size": 4,
    "max_steps": 1000,
    "lr": 1e-3,
    "final_lr": 1e-5,
    "warmup_steps": 100,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "grad_clip_norm": 1.0,
    "ema_decay": 0.9,
}


@pytest.mark.parametrize(
    ("start", "end", "steps", "step", "value"),
    [
        (0.0, 6.6, 5_000, 2_500, 3.3),  # KL weight
        (1.0, 1 / 16, 150_000, 75_000, 0.53125),  # temperature
        (1e-4, 1.25e-6, 1_200_000, 600_000, 5.0625e-5),  # step size
    ],
)
def test_cosine_is_half_way_in_the_middle_and_constant_after_its_end(
    start: float, end: float, steps: int, step: int, value: float
) -> None:
    assert cosine(step, start=start, end=end, steps=steps) == pytest.approx(value)
    assert cosine(0, start=start, end=end, steps=steps) == start
    assert cosine(steps, start=start, end=end, steps=steps) == end
    assert cosine(10 * steps, start=start, end=end, steps=steps) == end


def test_cosine_over_no_steps_is_its_end() -> None:
    assert cosine(0, start=1.0, end=0.5, steps=0) == 0.5


def test_learning_rate_warms_up_peaks_and_ends() -> None:
    rates = [warmup_cosine(step, peak=1.0, final=0.1, warmup_steps=10, steps=110) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == [0.1] * 90
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


def test_constant_rate_is_constant_after_warm_up() -> None:
    config = OptimConfig(**(NUMBERS | {"final_lr": 1e-3}))
    assert {config.lr_factor(step) for step in (99, 100, 500, 1000)} == {1.0}


def test_decay_can_end_before_training_does() -> None:
    config = OptimConfig(**NUMBERS, decay_steps=500)
    assert config.lr_factor(500) == config.lr_factor(1000) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"warmup_steps": 1000}, r"warmup_steps must be in \[0, max_steps = 1000\), got 1000"),
        ({"decay_steps": 2000}, r"decay_steps must be 0 or in .*\(100, 1000\], got 2000"),
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"final_lr": 1.0}, r"final_lr must be in \[0, lr = 0.001\], got 1.0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_interval": 0}, "ema_interval must be >= 1, got 0"),
        ({"ema_decay": 0.0, "ema_interval": 25}, "ema_interval must be 1 without an average.*got 25"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
    ],
)
def test_number_out_of_range_is_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**(NUMBERS | change))


def test_number_in_quotes_is_refused() -> None:
    with pytest.raises(TypeError, match=r"OptimConfig.max_steps must be a whole number, got '10'"):
        OptimConfig(**(NUMBERS | {"max_steps": "10"}))


def test_seeds_differ_by_everything_that_they_are_made_of() -> None:
    seeds = {derive_seed(seed, step, place) for seed in (0, 1, 20240101) for place in (0, 1) for step in range(50)}
    seeds |= {derive_seed(0, 1, 1, "val"), derive_seed(0, 11)}
    assert len(seeds) == 302, "1, 2 is another list than 12"
    assert max(seeds) < 2**32, "more bits would be ignored on a CPU"
