"""Curves of accuracy against candidates and guidance."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1.checkpoint import load_image_tokenizer, load_transformer
from dalle1.evaluation import sampling_curves
from dalle1.evaluation.sampling_curves import best_of, counts_up_to, draw_curves, format_curves, main, make_curves
from dalle1.pipeline import Pipeline
from dalle1.rerank.likelihood import LikelihoodReranker


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    right = torch.tensor([True, False, True, False, False])
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, -1.0])
    ranks = [1, 2, 3, 0, 4]  # by score, the earlier of equals first
    draws = list(itertools.combinations(range(5), n))
    expected = sum(bool(right[next(i for i in ranks if i in draw)]) for draw in draws) / len(draws)
    assert best_of(right, scores, n) == pytest.approx(expected)


def test_best_of_one_is_the_share_and_best_of_all_the_best() -> None:
    right, scores = torch.tensor([False, True, False]), torch.tensor([0.0, 1.0, 0.5])
    assert best_of(right, scores, 1) == pytest.approx(1 / 3)
    assert best_of(right, scores, 3) == 1
    with pytest.raises(ValueError, match=r"n must be in \[1, 3\], the number of candidates, got 4"):
        best_of(right, scores, 4)


def test_counts_are_powers_of_two_and_the_end() -> None:
    assert counts_up_to(1) == [1]
    assert counts_up_to(8) == [1, 2, 4, 8]
    assert counts_up_to(12) == [1, 2, 4, 8, 12]


@pytest.fixture(scope="module")
def curves(checkpoints: dict[str, Path]) -> dict[str, Any]:
    transformer = replace(load_transformer(checkpoints["transformer"]), caption_dropout=0.1)
    pipeline = Pipeline(transformer, load_image_tokenizer(checkpoints["dvae"]))
    rerankers = {"caption likelihood": LikelihoodReranker(transformer, of="caption")}
    with pytest.MonkeyPatch.context() as patched:
        # Right are the candidates with an even first token: about half of them, whatever these models draw.
        patched.setattr(
            sampling_curves, "_right", lambda result: [int(grid[0, 0]) % 2 == 0 for grid in result.image_tokens]
        )
        return make_curves(pipeline, rerankers, ["a red circle", "a blue square"], candidates=6, seed=0)


def test_curves_have_a_point_for_each_count_and_scale(curves: dict[str, Any]) -> None:
    assert set(curves["best_of"]) == {"temperature 0.7, guidance 1.5", "temperature 1, guidance 1"}
    for lines in curves["best_of"].values():
        assert set(lines) == {"caption likelihood", "nothing"}
        assert [point["n"] for point in lines["nothing"]] == [1, 2, 4, 6]
        assert len({point["accuracy"] for point in lines["nothing"]}) == 1, "choosing at random never helps"
        assert lines["caption likelihood"][0] == pytest.approx(lines["nothing"][0]), "of one there is no choice"
    for points in curves["guidance"].values():
        assert [point["guidance_scale"] for point in points] == [1, 1.25, 1.5, 2, 3, 4, 6]
    json.dumps(curves)


def test_curves_are_shown(curves: dict[str, Any]) -> None:
    assert draw_curves(curves).size == (990, 306)
    table = format_curves(curves)
    assert "best of N by ... (temperature 1, guidance 1)" in table
    assert "caption likelihood" in table


def test_missing_results_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sampling_curves", "--shards", str(tmp_path / "no-*.tar")])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 1
    assert "no shards match" in capsys.readouterr().err
