"""Counters of bounded size: exact where they can be, and what the whole has in the sum of its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle1.data import tallies
from dalle1.data.survey_report import ASPECT_EDGES, LENGTH_EDGES
from dalle1.data.tallies import Distribution, Examples, Fields, FrequentTexts, Mention, Repeats

NUMBERS = st.lists(st.one_of(st.integers(-5000, 10**6), st.floats(-1e9, 1e9)), min_size=1, max_size=200)


def distribution_of(numbers: list[Any]) -> Distribution:
    distribution = Distribution()
    for number in numbers:
        distribution.add(number)
    return distribution


@given(numbers=NUMBERS, percent=st.sampled_from([0, 1, 50, 95, 99.5, 100]))
def test_percentile_is_a_number_below_which_so_many_are(numbers: list[float], percent: float) -> None:
    expected = np.percentile(numbers, percent, method="inverted_cdf")
    found = distribution_of(numbers).percentile(percent)
    # Numbers within 2**-30 of 0 are 0.
    assert expected - max(1e-9, abs(expected) / 500) <= found <= expected + 1e-9


@given(numbers=st.lists(st.integers(0, 10**7), max_size=100))
def test_numbers_between_edges_are_counted_exactly(numbers: list[int]) -> None:
    expected = np.histogram(numbers, [*LENGTH_EDGES, np.inf])[0].tolist()
    assert distribution_of(numbers).count(LENGTH_EDGES) == expected
    aspects = [1 + number / 1024 for number in numbers]
    assert distribution_of(aspects).count(ASPECT_EDGES) == np.histogram(aspects, [*ASPECT_EDGES, np.inf])[0].tolist()


def test_bins_become_wider_rather_than_many() -> None:
    numbers = np.exp(np.random.default_rng(0).normal(0, 8, 20_000)).tolist()
    whole, parts = distribution_of(numbers), distribution_of(numbers[:7000])
    parts.merge(distribution_of(numbers[7000:]))
    assert len(whole._bins) <= tallies._MOST_BINS
    assert (whole._bins, whole.least, whole.most, whole.n) == (parts._bins, parts.least, parts.most, parts.n)
    assert whole.percentile(50) == pytest.approx(np.percentile(numbers, 50), rel=0.05)


def test_repeats_are_exact_up_to_a_number_and_estimated_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [str(number % 3000).encode() for number in range(4000)]
    few, many = Repeats(), Repeats()
    for number, content in enumerate(contents):
        few.add(content, number)
    assert (few.is_exact, few.n_distinct, few.n_repeated) == (True, 3000, 1000)
    assert few.examples(2) == [(2, 0, 3000), (2, 1, 3001)]

    monkeypatch.setattr(tallies, "_MOST_HASHES", 800)
    monkeypatch.setattr(tallies, "_WAITING", 100)
    for start in range(0, 4000, 50):
        part = Repeats()
        for number in range(start, start + 50):
            part.add(contents[number], number)
        many.merge(part)
    assert not many.is_exact
    assert len(many._rows) <= 800
    assert many.n_distinct == pytest.approx(3000, rel=0.15)
    assert many.n_repeated == pytest.approx(1000, rel=0.25)


def test_frequent_texts_are_found_among_any_number_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "_MOST_TEXTS", 50)
    rng = np.random.default_rng(0)
    texts = [f"rare {number}" for number in range(3000)] + ["often"] * 200 + ["x" * 300] * 100
    rng.shuffle(texts)
    frequent = FrequentTexts()
    for start in range(0, len(texts), 33):
        part = FrequentTexts()
        for text in texts[start : start + 33]:
            part.add(text)
        frequent.merge(part)
    found = dict(frequent.most_frequent(2))
    assert list(found) == ["often", "x" * 200]
    assert found["often"] <= 200 <= found["often"] + frequent.too_low
    assert len(frequent._counts) <= 100


def test_examples_have_the_lowest_values_and_each_looks_different() -> None:
    examples, parts = Examples(3), Examples(3)
    mentions = [(float(number % 4), Mention(number=number, key="k", container="c", note="n")) for number in range(9)]
    for value, mention in mentions:
        examples.add("kind", value, mention)
        part = Examples(3)
        part.add("kind", value, mention)
        parts.merge(part)
    assert [mention.number for mention in examples.of("kind")] == [0, 1, 2]
    assert parts.of("kind") == examples.of("kind")
    assert examples.counts == parts.counts == {"kind": 9}
    assert examples.of("another") == []


def test_fields_are_named_as_filters_name_them_and_bounded() -> None:
    whole, parts = Fields(), Fields()
    rows: list[dict[str, Any]] = [
        {"a": {"b": number, "c": {"d": {"e": 1}}}, "text": "0.5", "key": "0012", "yes": True, "none": None, "list": [1]}
        | {f"field {number} {other}": 10**400 for other in range(50)}
        for number in range(10)
    ]
    for row in rows:
        whole.add(row)
        part = Fields()
        part.add(row)
        parts.merge(part)
    for fields in (whole, parts):
        by_name = fields.by_name
        assert list(by_name)[:7] == ["a.b", "a.c.d", "text", "key", "yes", "none", "list"]
        assert len(by_name) == 200
        assert fields.n_others == 500 - 193
        assert (by_name["a.b"].numbers.n, by_name["a.b"].numbers.most, by_name["text"].numbers.most) == (10, 9, 0.5)
        assert by_name["key"].numbers.n == 0
        assert [dict(by_name[name].kinds) for name in ("a.c.d", "text", "yes", "none", "list")] == [
            {"object": 10},
            {"text": 10},
            {"true or false": 10},
            {"null": 10},
            {"list": 10},
        ]
        assert by_name["yes"].values == {"true": 10}
        assert (len(by_name["field 0 0"].values), by_name["field 0 0"].numbers.n) == (1, 0)


@given(numbers=NUMBERS)
def test_every_number_lies_from_the_lowest_edge_on(numbers: list[float]) -> None:
    distribution = distribution_of(numbers)
    assert distribution.lowest_edge <= distribution.least + 1e-9
    assert distribution.count([distribution.lowest_edge]) == [len(numbers)]
