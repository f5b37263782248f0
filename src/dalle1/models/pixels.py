"""The pixel domain of the dVAE: the only place that knows about it.

Pictures are float in [0, 1] at every public boundary. The logit-Laplace density lives on the open interval
(0, 1), so the dVAE sees pixels mapped into [0.1, 0.9] (Ramesh et al. 2021, app. A.3).
"""

from jaxtyping import Float
from torch import Tensor

LOGIT_LAPLACE_EPS = 0.1  # paper, app. A.3


def map_pixels(image: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels in [0, 1] as the dVAE sees them, in [0.1, 0.9]."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * image + LOGIT_LAPLACE_EPS


def unmap_pixels(mapped: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Mapped pixels back in [0, 1]; values outside [0.1, 0.9] are clamped."""
    return ((mapped - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)
