"""Distances of feature sets against closed forms and independent computations in numpy and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from dalle1.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    kid_subset_size,
    precision_recall,
)


def features(n: int, d: int = 6, *, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(n, d, generator=generator) @ mix + shift


def with_moments(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> Tensor:
    """Numbers whose sample mean and unbiased covariance are exactly these."""
    noise = np.random.default_rng(seed).normal(size=(n, len(mean)))
    noise -= noise.mean(0)
    whitened = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise.T))).T
    return torch.from_numpy(whitened @ np.linalg.cholesky(covariance).T + mean)


def test_fid_of_gaussians_that_commute_is_the_closed_form() -> None:
    # Of diagonal covariances: |mean difference|^2 + sum of (deviation difference)^2.
    deviations = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 1.5])
    means = np.array([0.0, 1.0, -2.0]), np.array([2.0, 1.0, 0.0])
    sets = [with_moments(50 + 9 * i, means[i], np.diag(deviations[i] ** 2), seed=i) for i in (0, 1)]
    assert frechet_distance(*sets) == pytest.approx(4 + 4 + 4 + 1, rel=1e-9)


def test_fid_is_what_scipy_gives() -> None:
    a, b = features(40).double().numpy(), features(70, seed=1, shift=0.5, scale=1.7).double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)


def test_fid_does_not_depend_on_how_many_rows_are_taken_at_once() -> None:
    a, b = features(1500, d=3), features(1100, d=3, seed=1, shift=0.3)
    centered = [x.double().numpy() for x in (a, b)]
    covariances = [np.cov(x.T) for x in centered]
    expected = np.sum((centered[0].mean(0) - centered[1].mean(0)) ** 2) + np.trace(
        sum(covariances) - 2 * scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_fid_of_equal_sets_is_zero_also_with_fewer_pictures_than_features() -> None:
    for n in (30, 4):
        a = features(n, d=8)
        assert 0 <= frechet_distance(a, a.clone()) < 1e-5


def kid_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    m = len(a)
    within = sum(kernel(x[i], x[j]) for x in (a, b) for i, j in itertools.product(range(m), repeat=2) if i != j)
    between = sum(kernel(x, y) for x in a for y in b)
    return within / (m * (m - 1)) - 2 * between / m**2


def test_kid_of_whole_sets_is_the_formula_by_loops() -> None:
    a, b = features(12), features(12, seed=1, shift=0.4)
    expected = kid_by_loops(a.double().numpy(), b.double().numpy())
    result = kernel_distance(a, b, subset_size=12, subsets=2)
    assert result.mean == pytest.approx(expected, rel=1e-9)
    assert result.deviation == pytest.approx(0, abs=1e-9)


def test_kid_depends_on_its_seed_alone() -> None:
    a, b = features(30), features(40, seed=1)
    torch.manual_seed(1)
    first = kernel_distance(a, b, subset_size=10, subsets=5, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert kernel_distance(a, b, subset_size=10, subsets=5, seed=3) == first
    assert kernel_distance(a, b, subset_size=10, subsets=5, seed=4) != first
    torch.manual_seed(1)
    kernel_distance(a, b, subset_size=10, subsets=5)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's numbers were taken


def test_kid_subsets_are_of_1000_pictures_or_half_of_the_smaller_side() -> None:
    assert kid_subset_size(5000, 30000) == 1000
    assert kid_subset_size(5000, 201) == 100
    assert kid_subset_size(3, 9) == 2


def test_inception_score_of_even_certain_classes_is_their_number() -> None:
    probabilities = torch.eye(4).repeat(10, 1)  # in each of ten splits every class once
    result = inception_score(probabilities)
    assert result.mean == pytest.approx(4)
    assert result.deviation == pytest.approx(0, abs=1e-12)
    assert inception_score(torch.full((20, 7), 1 / 7)).mean == pytest.approx(1)


def test_inception_score_is_the_formula_by_loops() -> None:
    probabilities = torch.rand(23, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    scores = []
    for part in np.array_split(probabilities.double().numpy(), 3):
        marginal = part.mean(0)
        scores.append(np.exp(np.mean([np.sum(row * np.log(row / marginal)) for row in part])))
    result = inception_score(probabilities, splits=3)
    assert result.mean == pytest.approx(np.mean(scores), rel=1e-6)
    assert result.deviation == pytest.approx(np.std(scores), rel=1e-6)


def share_within(points: np.ndarray, centers: np.ndarray, k: int) -> float:
    radii = [np.sort([np.linalg.norm(c - other) for other in centers])[k] for c in centers]  # [0] is itself
    return float(
        np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centers, radii, strict=True)) for p in points])
    )


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.evaluation.distances._ROWS_AT_ONCE", 7)  # several blocks, the last one smaller
    a, b = features(30), features(41, seed=1, shift=1.0, scale=0.6)
    result = precision_recall(a, b, k=k)
    assert result.precision == share_within(b.numpy(), a.numpy(), k)
    assert result.recall == share_within(a.numpy(), b.numpy(), k)
    assert 0 < result.recall < 1
    assert result.precision != result.recall


def test_samples_of_one_mode_are_precise_and_recall_little() -> None:
    reference = torch.cat([features(40), features(40, seed=1, shift=100)])
    result = precision_recall(reference, reference[:40] + 1e-4)
    assert result.precision == 1
    assert result.recall == 0.5


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("at least 2 pictures of each side, got 30 and 1", lambda a: frechet_distance(a, a[:1])),
        (r"shapes \(30, 6\) and \(30, 5\)", lambda a: precision_recall(a, a[:, :5])),
        ("finite numbers", lambda a: frechet_distance(a, a / 0)),
        ("of each side, 30 and 9, got 10", lambda a: kernel_distance(a, a[:9], subset_size=10)),
        ("subset_size must be >= 2, got 1", lambda a: kernel_distance(a, a, subset_size=1)),
        ("below the number of pictures of each side, 30 and 3, got 3", lambda a: precision_recall(a, a[:3])),
        ("at least 20 pictures for 10 splits, got 19", lambda a: inception_score(torch.eye(19))),
        ("sum 1 for each picture", lambda a: inception_score(a)),
    ],
)  # fmt: skip
def test_what_has_no_distance_is_said_in_one_sentence(message: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(features(30))
