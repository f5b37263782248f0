"""Use of the codebook: closed forms, and when the alarm sounds."""

from __future__ import annotations

import math

import pytest
import torch

from dalle1.evaluation.codebook_usage import codebook_usage, collapse_alarm


def counts(vocab_size: int, *used: int) -> torch.Tensor:
    return torch.tensor([*used, *[0] * (vocab_size - len(used))])


def test_equal_use_of_n_codes_has_perplexity_n() -> None:
    usage = codebook_usage(counts(10, 7, 7, 7, 7))
    assert usage.perplexity == pytest.approx(4)
    assert (usage.n_used, usage.used_share, usage.n_dead, usage.n_tokens) == (4, 0.4, 6, 28)


def test_perplexity_is_exp_of_the_entropy() -> None:
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert codebook_usage(counts(5, 30, 0, 10)).perplexity == pytest.approx(expected)


def test_words_of_usage() -> None:
    assert str(codebook_usage(counts(8, 1, 1))) == "2 of 8 codes in use (6 dead), perplexity 2.0, in 2 tokens"


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token, got none"):
        codebook_usage(counts(4))


@pytest.mark.parametrize(
    ("vocab_size", "used", "collapsed"),
    [
        (512, [100] * 4, True),  # what random codes gave with little compute
        (512, [100] * 25, True),
        (512, [100] * 26, False),  # 5% of 512 is 25.6
        (512, [90_000, *[20] * 491], False),  # one flat background, nearly all codes in use
        (512, [10**9, *[1] * 491], True),  # all but one code in a handful of positions
        (8192, [1] * 8, False),  # few tokens can reach few codes
        (8192, [1000] * 300, True),
        (16, [5, 5], False),
        (2, [501, 499], False),
        (2, [1000], True),
        (512, [1], False),  # one token can have only one code
        (16, [10], True),
    ],
)
def test_alarm_sounds_when_codes_are_not_used(vocab_size: int, used: list[int], collapsed: bool) -> None:
    assert (collapse_alarm(codebook_usage(counts(vocab_size, *used))) is not None) == collapsed


def test_alarm_says_what_must_hold_what_is_and_what_to_change() -> None:
    alarm = collapse_alarm(codebook_usage(counts(512, 200, 200, 200, 200)))
    assert alarm is not None
    assert "at least 26 codes must be in use and perplexity must be >= 2" in alarm
    assert "got 4 of 512 codes in use (508 dead), perplexity 4.0" in alarm
    for option in ("optim.codebook_start_step", "optim.lr", "optim.temperature_steps", "optim.kl_weight", "= 6.2"):
        assert option in alarm
