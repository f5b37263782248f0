"""Temperature, top-k and top-p."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dalle1.sampling.filters import (
    SamplingConfig,
    apply_temperature,
    filter_logits,
    guide,
    keep_top_k,
    keep_top_p,
)

LOGITS = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64).log()


def _kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_temperature_divides_logits() -> None:
    torch.testing.assert_close(apply_temperature(LOGITS, 2.0).softmax(-1), (LOGITS / 2).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 0])
def test_lowest_temperatures_leave_only_the_most_likely_code(temperature: float) -> None:
    probs = apply_temperature(LOGITS[:1], temperature).softmax(-1)
    assert probs.tolist() == [[0, 1, 0, 0, 0]]


def test_temperature_0_takes_the_lowest_of_equals() -> None:
    assert _kept(apply_temperature(LOGITS[1:], 0)) == [[0]]


def test_temperatures_of_positions() -> None:
    assert SamplingConfig(temperature=0.7).temperatures(2, 3) == [0.7] * 6
    assert SamplingConfig(temperature=0.7).temperatures(32, 32) == [0.7] * 1024
    assert SamplingConfig(temperature=(0.5, 2)).temperatures(2, 3) == [0.5] * 3 + [2] * 3
    even = SamplingConfig(temperature=1.0, temperature_end=0.5).temperatures(2, 3)
    assert even == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert SamplingConfig(temperature=1.0, temperature_end=0.5).temperatures(1, 1) == [1.0]
    with pytest.raises(ValueError, match="temperature must be one number or one for each of 3 rows, got 2"):
        SamplingConfig(temperature=(0.5, 2)).temperatures(3, 2)


@given(st.floats(0, 5), st.floats(0, 5), st.integers(1, 9), st.integers(2, 9))
def test_changing_temperature_is_exact_at_its_ends_and_stays_between(
    first: float, last: float, height: int, width: int
) -> None:
    temperatures = SamplingConfig(temperature=first, temperature_end=last).temperatures(height, width)
    assert (temperatures[0], temperatures[-1]) == (first, last)
    slack = 1e-12
    assert min(temperatures) >= max(0, min(first, last) - slack)
    assert max(temperatures) <= max(first, last) + slack


def test_top_k_keeps_the_k_largest_and_does_not_change_them() -> None:
    kept = keep_top_k(LOGITS[:1], 3)
    assert _kept(kept) == [[1, 3, 4]]
    assert torch.equal(kept[0, [1, 3, 4]], LOGITS[0, [1, 3, 4]])


def test_top_k_keeps_exactly_k_of_equals_the_lower_codes_first() -> None:
    assert _kept(keep_top_k(LOGITS[1:], 2)) == [[0, 1]]
    assert _kept(keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]]), 3)) == [[1, 2, 3]]


@pytest.mark.parametrize("top_k", [0, 5, 6, 1000])
def test_top_k_of_0_or_all_codes_is_off(top_k: int) -> None:
    assert torch.equal(keep_top_k(LOGITS, top_k), LOGITS)


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.001, [1]), (0.39, [1]), (0.5, [1, 3]), (0.7, [1, 3, 4]), (0.9, [0, 1, 3, 4])]
)
def test_top_p_keeps_the_fewest_codes_that_reach_p(top_p: float, expected: list[int]) -> None:
    assert _kept(keep_top_p(LOGITS[:1], top_p)) == [expected]


def test_top_p_counts_codes_that_reach_p_exactly() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])  # probabilities are exactly 1/4
    assert _kept(keep_top_p(logits, 0.5)) == [[0, 1]]
    assert _kept(keep_top_p(logits, 0.51)) == [[0, 1, 2]]


def test_top_p_of_1_is_off() -> None:
    assert torch.equal(keep_top_p(LOGITS, 1.0), LOGITS)


def test_top_p_counts_only_what_top_k_left() -> None:
    # Of 0.4 and 0.25 the first alone has 0.615.
    assert _kept(filter_logits(LOGITS[:1], SamplingConfig(top_k=2, top_p=0.6), 1.0)) == [[1]]


def test_default_settings_keep_the_distribution() -> None:
    torch.testing.assert_close(filter_logits(LOGITS, SamplingConfig(), 1.0).softmax(-1), LOGITS.softmax(-1))


def test_guidance_goes_from_no_caption_to_the_caption_and_beyond() -> None:
    told, untold = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert guide(told, untold, 0).tolist() == untold.tolist()
    assert guide(told, untold, 1).tolist() == told.tolist()
    assert guide(told, untold, 3).tolist() == [[3.0, -1.0]]


_ROWS = st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=12)


@given(row=_ROWS, top_k=st.integers(1, 15), top_p=st.floats(0.01, 1))
def test_filters_agree_with_sorting_the_codes_one_by_one(row: list[float], top_k: int, top_p: float) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    order = sorted(range(len(row)), key=lambda code: (-row[code], code))
    assert _kept(keep_top_k(logits, top_k)) == [sorted(order[:top_k])]
    total = math.fsum(math.exp(value) for value in row)
    kept = set(_kept(keep_top_p(logits, top_p))[0])
    assert kept == set(order[: len(kept)]), "the most likely ones"
    reached = [math.fsum(math.exp(row[code]) for code in order[:n]) / total for n in range(len(row) + 1)]
    assert kept, "at least one code stays"
    assert reached[len(kept)] >= top_p - 1e-9
    assert reached[len(kept) - 1] < top_p + 1e-9 or top_p == 1


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"temperature": -1}, ValueError, r"temperature must be a finite number >= 0 \(0 is greedy\), got -1"),
        ({"temperature": math.nan}, ValueError, r"temperature must be a finite number >= 0 \(0 is greedy\), got nan"),
        ({"temperature": math.inf}, ValueError, r"temperature must be a finite number >= 0 \(0 is greedy\), got inf"),
        ({"temperature": [1.0, -2]}, ValueError, r"temperature must be a finite number >= 0 \(0 is greedy\), got -2"),
        ({"temperature_end": -1}, ValueError, r"temperature_end must be a finite number >= 0 \(0 is greedy\), got -1"),
        ({"temperature_end": True}, TypeError, "temperature_end must be a number, got True"),
        ({"temperature": (1.0, 0.5), "temperature_end": 1.0}, ValueError, "must be one number with temperature_end"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"guidance_scale": -1}, ValueError, "guidance_scale must be a finite number >= 0, got -1"),
        ({"guidance_scale": math.inf}, ValueError, "guidance_scale must be a finite number >= 0, got inf"),
        ({"top_k": -1}, ValueError, r"top_k must be >= 0 \(0 means all codes\), got -1"),
        ({"top_k": 0.9}, TypeError, "top_k must be a whole number, got 0.9"),
        ({"top_p": 0}, ValueError, r"top_p must be in \(0, 1\] \(1 means all codes\), got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\] .*, got 1.5"),
        ({"top_p": math.nan}, ValueError, r"top_p must be in \(0, 1\] .*, got nan"),
    ],
)
def test_config_refuses_a_wrong_value(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingConfig(**option)
