"""How far two sets of pictures are from each other, from features of their pictures: FID, KID, precision and recall.

All are computed in float64. Shapes: n and m pictures, d features, c classes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

from dalle1.data.fields import require_int

KID_SUBSETS = 100  # as in Binkowski et al. 2018, and the most of each that they take
KID_SUBSET_SIZE = 1000
INCEPTION_SPLITS = 10  # Salimans et al. 2016
NEAREST = 3  # Kynkaanniemi et al. 2019
_ROWS_AT_ONCE = 1024  # bounds the memory of distances and of float64 copies


class _AsTheyAre(nn.Module):
    """What torchmetrics takes for its network: the features were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Its input."""
        return features


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over parts of the pictures, and the standard deviation between these parts."""

    mean: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Shares in [0, 1], see `precision_recall`."""

    precision: float
    recall: float


def frechet_distance(reference: Float[Tensor, "n d"], samples: Float[Tensor, "m d"]) -> float:
    """FID (Heusel et al. 2017): squared Frechet distance of the Gaussians with the sets' means and covariances, >= 0.

    Covariances are unbiased (n - 1). The distance itself is not: it falls with more pictures, and means little below
    as many pictures as features. Compare only numbers of equal counts.

    Raises: ValueError for less than 2 pictures on a side, other numbers of features, or numbers that are not finite.
    """
    _check(reference, samples)
    # Of several processes only one computes: nothing to be gathered from the others.
    metric = FrechetInceptionDistance(_AsTheyAre(reference.shape[1]), sync_on_compute=False)
    for features, is_reference in ((reference, True), (samples, False)):
        for part in torch.split(features, _ROWS_AT_ONCE):
            metric.update(part.double(), real=is_reference)
    # Rounding can carry the distance of equal sets just below zero.
    return max(0.0, float(metric.compute()))


def kid_subset_size(n_reference: int, n_samples: int) -> int:
    """Pictures of each side in a subset: 1000, as in the paper, or half of the smaller side, so that subsets differ."""
    return min(KID_SUBSET_SIZE, max(2, min(n_reference, n_samples) // 2))


def kernel_distance(
    reference: Float[Tensor, "n d"],
    samples: Float[Tensor, "m d"],
    *,
    subset_size: int,
    subsets: int = KID_SUBSETS,
    seed: int = 0,
) -> Estimate:
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (x . y / d + 1)^3, mean over random subsets.

    0 is expected for equal distributions, and single values may lie below. Unlike the FID it does not depend on the
    number of pictures.

    Args:
        reference: Features of one side.
        samples: Of the other.
        subset_size: Pictures of each side in a subset.
        subsets: How many are drawn, each without replacement.
        seed: Of the draws.

    Raises: ValueError as `frechet_distance`, and for a `subset_size` below 2 or above either number of pictures.
    """
    _check(reference, samples)
    require_int("subset_size", subset_size, at_least=2)
    if subset_size > min(len(reference), len(samples)):
        counts = f"{len(reference)} and {len(samples)}"
        raise ValueError(
            f"subset_size must be at most the number of pictures of each side, {counts}, got {subset_size}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        metric = KernelInceptionDistance(
            _AsTheyAre(reference.shape[1]), subsets=subsets, subset_size=subset_size, sync_on_compute=False
        )
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    # It draws from the global generator of the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return Estimate(mean=float(mean), deviation=float(deviation))


def inception_score(probabilities: Float[Tensor, "n c"], *, splits: int = INCEPTION_SPLITS) -> Estimate:
    """IS (Salimans et al. 2016): exp of the mean KL divergence of each picture's classes to their mean, in [1, c].

    Mean and deviation (n, not n - 1) over `splits` parts of consecutive pictures, as in the first implementation.

    Raises: ValueError for fewer pictures than 2 for each split, or rows that are no probabilities.
    """
    if len(probabilities) < 2 * splits:
        raise ValueError(
            f"the inception score needs at least {2 * splits} pictures for {splits} splits, got {len(probabilities)}"
        )
    probs = probabilities.double()
    if bool((probs < 0).any()) or not torch.allclose(probs.sum(1), torch.ones_like(probs[:, 0]), atol=1e-3):
        raise ValueError("class probabilities must be >= 0 and have the sum 1 for each picture, some do not")
    # Parts as even as possible; in float32 a sum is 1 but for rounding.
    parts = torch.tensor_split(probs / probs.sum(1, keepdim=True), splits)
    scores = torch.tensor([_inception_score(part) for part in parts], dtype=torch.float64)
    return Estimate(mean=float(scores.mean()), deviation=float(scores.std(correction=0)))


def _inception_score(probs: Float[Tensor, "n c"]) -> float:
    marginal = probs.mean(0)
    # 0 ln 0 is 0.
    divergence = (torch.xlogy(probs, probs) - torch.xlogy(probs, marginal)).sum(1)
    return math.exp(float(divergence.mean()))


def precision_recall(
    reference: Float[Tensor, "n d"], samples: Float[Tensor, "m d"], *, k: int = NEAREST
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision is the share of samples that lie within the manifold of the reference: at most as far from one of its
    pictures as that is from its k-th nearest other one. Recall is the same with the sides changed.

    Raises: ValueError as `frechet_distance`, and unless 1 <= k < the number of pictures of each side.
    """
    _check(reference, samples)
    require_int("k", k, at_least=1)
    if k >= min(len(reference), len(samples)):
        counts = f"{len(reference)} and {len(samples)}"
        raise ValueError(f"k must be below the number of pictures of each side, {counts}, got {k}")
    precision = _within(samples, reference, _squared_radii(reference, k))
    recall = _within(reference, samples, _squared_radii(samples, k))
    return PrecisionRecall(precision=float(precision.double().mean()), recall=float(recall.double().mean()))


def _squared_radii(features: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Squared distance of each picture to its k-th nearest other one."""
    radii, first = [], 0
    for rows in _blocks(features):
        distances = _squared_distances(rows, features)
        distances[torch.arange(len(rows)), first + torch.arange(len(rows))] = math.inf  # itself
        radii.append(distances.kthvalue(k, dim=1).values)
        first += len(rows)
    return torch.cat(radii)


def _within(
    features: Float[Tensor, "n d"], centers: Float[Tensor, "m d"], squared_radii: Float[Tensor, " m"]
) -> Bool[Tensor, " n"]:
    """Which pictures lie in the ball around any of the centers."""
    return torch.cat([(_squared_distances(rows, centers) <= squared_radii).any(1) for rows in _blocks(features)])


def _blocks(features: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "b d"]]:
    """Some rows after the others, with a bar where that takes long: 30,000 pictures of each side take minutes."""
    blocks = torch.split(features, _ROWS_AT_ONCE)
    yield from tqdm(blocks, desc="nearest neighbours", unit=" blocks", delay=2.0, disable=None)


def _squared_distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    a, b = a.double(), b.double()
    # By products of matrices, 30 times as fast as by differences; float64 leaves 1e-15 of the squares' sum as error.
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def _check(reference: Tensor, samples: Tensor) -> None:
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            "both sides must have as many features of each picture, got shapes "
            f"{tuple(reference.shape)} and {tuple(samples.shape)}"
        )
    if min(len(reference), len(samples)) < 2:
        raise ValueError(
            f"a distance needs at least 2 pictures of each side, got {len(reference)} and {len(samples)}; give more"
        )
    if not bool(reference.isfinite().all() and samples.isfinite().all()):
        raise ValueError("features must be finite numbers, some are not; take another extractor")
