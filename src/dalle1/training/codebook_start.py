"""A start for the codebook from the encoder's own features, so that codes mean something from their first step.

From random weights the relaxation is pure noise to the decoder: on little compute it settles on a handful of
codes (4 of 512 in our trials) before the encoder learns to speak. Here the dVAE first trains for some steps as a
plain autoencoder; then its features are clustered, each centroid becomes a code, and the encoder's head is set
so that a code's logit falls with the squared distance to its centroid. This is the paper's architecture, started
in a better place; the paper itself starts from random weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dalle1.models.dvae import DVAE
from dalle1.models.relaxation import most_likely_codes

# Steps of Lloyd's algorithm; the assignment hardly changes after ten.
_LLOYD_STEPS = 10
# The encoder's largest maps exist for only so many.
_PICTURES_AT_ONCE = 8
# Seeds of up to this many clusters are drawn one by one, of more in this many rounds: 8192 one by one take minutes.
_SEEDING_ROUNDS = 256


def kmeans(
    points: Float[Tensor, "n d"], n_clusters: int, generator: torch.Generator
) -> tuple[Float[Tensor, "k d"], float]:
    """Centroids, and the mean squared distance of a point to its centroid.

    Starts as k-means++ does: further centroids are points drawn with probability proportional to their squared
    distance to the nearest one so far.

    Raises: ValueError if there are fewer points than clusters."""
    if len(points) < n_clusters:
        raise ValueError(f"need at least as many points as clusters ({n_clusters}), got {len(points)}")
    centroids = points[torch.randint(len(points), (1,), generator=generator)]
    nearest = (points - centroids).square().sum(1)
    while len(centroids) < n_clusters:
        count = min(max(1, n_clusters // _SEEDING_ROUNDS), n_clusters - len(centroids))
        # The small constant lets duplicates be drawn when there are fewer distinct points than clusters.
        chosen = points[torch.multinomial(nearest + 1e-12, count, generator=generator)]
        centroids = torch.cat([centroids, chosen])
        nearest = torch.minimum(nearest, torch.cdist(points, chosen).square_().amin(1))
    for _ in range(_LLOYD_STEPS):
        # The nearest centroid c of a point x has the largest 2 x.c - |c|^2.
        label = most_likely_codes(points, 2 * centroids, -centroids.square().sum(1))
        sums = torch.zeros_like(centroids).index_add_(0, label, points)
        sizes = torch.bincount(label, minlength=n_clusters)[:, None]
        distance = (points - centroids[label]).square().sum(1)
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    return centroids, float(distance.mean())


@torch.no_grad()
def start_codebook(
    dvae: DVAE, image: Float[Tensor, "b 3 h w"], *, sharpness: float, generator: torch.Generator
) -> None:
    """Set the codebook and the encoder's head of `dvae` from the features of some training pictures.

    Args:
        dvae: Trained for a while with its features fed straight to the decoder.
        image: Pictures in [0, 1], enough that their grid positions outnumber the codes.
        sharpness: Logits fall by this much at the mean squared distance of a feature to its centroid; > 0.
        generator: Randomness of the clustering, on the CPU.
    """
    check_feature_width(dvae)
    features = torch.cat([dvae.features(part).flatten(0, 2).float() for part in torch.split(image, _PICTURES_AT_ONCE)])
    if not torch.isfinite(features).all():
        raise ValueError("the codebook's start needs finite features, got NaN or infinity; set a lower optim.lr")
    if len(features) < dvae.config.vocab_size:
        raise ValueError(
            f"the codebook's start needs at least as many grid positions as codes, {dvae.config.vocab_size}, got "
            f"{len(features)} of {len(image)} pictures; raise optim.codebook_start_pictures"
        )
    centroids, spread = kmeans(features.cpu(), dvae.config.vocab_size, generator)
    centroids = centroids.to(features.device)
    precision = sharpness / max(spread, 1e-6)
    # -precision * |f - c|^2 = 2 precision f.c - precision |c|^2 + what is the same for all codes.
    dvae.encoder.head.weight.copy_((2 * precision * centroids)[:, :, None, None])
    assert dvae.encoder.head.bias is not None, "all convolutions of the dVAE have a bias"
    dvae.encoder.head.bias.copy_(-precision * centroids.square().sum(1))
    dvae.codebook.copy_(centroids)


def check_feature_width(dvae: DVAE) -> None:
    """Raise ValueError unless the encoder's features can stand in for code vectors."""
    if dvae.config.n_init != dvae.config.feature_width:
        raise ValueError(
            f"a codebook start needs n_init = n_hid * 2^(n_groups - 1) = {dvae.config.feature_width}, "
            f"got {dvae.config.n_init}; set model.n_init={dvae.config.feature_width} or optim.codebook_start_step=0"
        )
