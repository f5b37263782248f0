"""The codebook's start: clusters are found, and the head's logits are distances to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dalle1.models.dvae import DVAE
from dalle1.training.codebook_start import kmeans, start_codebook


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_kmeans_finds_separate_clusters() -> None:
    centers = 10 * torch.eye(6)
    points = centers.repeat_interleave(50, dim=0) + 0.01 * torch.randn(300, 6, generator=generator())

    centroids, spread = kmeans(points, 6, generator())

    assert torch.cdist(centers, centroids).min(dim=1).values.max() < 0.01
    assert spread == pytest.approx(6 * 0.01**2, rel=0.2)


def test_kmeans_of_fewer_distinct_points_than_clusters_still_ends() -> None:
    centroids, spread = kmeans(torch.tensor([[0.0], [1.0]]).repeat(5, 1), 4, generator())
    assert centroids.shape == (4, 1)
    assert spread == 0


def test_kmeans_of_too_few_points_is_refused() -> None:
    with pytest.raises(ValueError, match=r"as many points as clusters \(8\), got 3"):
        kmeans(torch.zeros(3, 2), 8, generator())


def test_started_logits_fall_with_the_squared_distance_to_each_code(make_dvae: Callable[..., DVAE]) -> None:
    dvae = make_dvae()
    image = torch.rand(20, 3, 12, 16, generator=generator())

    start_codebook(dvae, image, sharpness=3.0, generator=generator())

    features = dvae.features(image)
    distance = torch.cdist(features.flatten(0, 2), dvae.codebook).square()
    drop = dvae.logits(image).flatten(0, 2).detach()
    drop = drop.max(dim=1, keepdim=True).values - drop
    nearest = distance.min(dim=1, keepdim=True).values
    # The sharpness is the fall at the mean squared distance to the own centroid.
    expected = 3.0 / nearest.mean() * (distance - nearest)
    # k-means stops after ten steps, so the spread it measured is near, not equal to, the final one.
    torch.testing.assert_close(drop, expected, rtol=0.05, atol=1e-2)
    assert torch.equal(dvae.encode(image).flatten(), distance.argmin(dim=1))


def test_features_that_are_not_finite_are_refused(make_dvae: Callable[..., DVAE]) -> None:
    dvae = make_dvae()
    assert dvae.encoder.stem.bias is not None
    dvae.encoder.stem.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"needs finite features, got NaN or infinity; set a lower optim\.lr"):
        start_codebook(dvae, torch.rand(20, 3, 12, 16), sharpness=1.0, generator=generator())


def test_codebook_of_another_width_than_the_features_is_refused(make_dvae: Callable[..., DVAE]) -> None:
    with pytest.raises(ValueError, match=r"n_init = n_hid \* 2\^\(n_groups - 1\) = 8, got 4; set model.n_init=8"):
        start_codebook(make_dvae(n_init=4), torch.rand(20, 3, 12, 16), sharpness=1.0, generator=generator())
