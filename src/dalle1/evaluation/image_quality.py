"""How near pictures are to their originals: one value per picture, pixels in [0, 1]."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

SSIM_SMALLEST_SIDE = 11  # pixels: the side of its window
_SSIM_REACH = SSIM_SMALLEST_SIDE // 2
_STRIP_VALUES = 2**20  # pixel values of all pictures that SSIM takes at once
_SMALLEST_ERROR = 1e-10  # mean square at which PSNR stops, at 100 dB


def squared_error(image: Float[Tensor, "b 3 h w"], original: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Mean square of the difference of all pixel values, in [0, 1]; 0 is equality."""
    return (image.float() - original.float()).square().mean(dim=(1, 2, 3))


def psnr_db(error: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of a `squared_error`, -10 log10(error) as the peak is 1: in [0, 100] dB."""
    return -10 * error.clamp(min=_SMALLEST_ERROR).log10()


def ssim(image: Float[Tensor, "b 3 h w"], original: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Structural similarity (Wang et al. 2004), mean over pixels and colours: in [-1, 1]; 1 is equality.

    Gaussian window of 11 pixels with deviation 1.5, K1 = 0.01, K2 = 0.03; pictures are mirrored at their edges.

    Raises: ValueError for a side below 11 pixels: the window must fit into the picture.
    """
    height, width = image.shape[-2:]
    if min(height, width) < SSIM_SMALLEST_SIDE:
        raise ValueError(f"SSIM needs sides of at least {SSIM_SMALLEST_SIDE} pixels, got {height}x{width}")
    # A strip at a time with what its windows reach: in one piece it would take 0.7 GB per megapixel.
    rows = max(SSIM_SMALLEST_SIDE, _STRIP_VALUES // image[:, :, 0].numel())
    total = torch.zeros(len(image), device=image.device)
    for top in range(0, height, rows):
        first, last = max(top - _SSIM_REACH, 0), min(top + rows + _SSIM_REACH, height)
        similarity = _ssim_map(image[:, :, first:last], original[:, :, first:last])
        total += similarity[:, :, top - first : top - first + rows].sum(dim=(1, 2, 3))
    return total / original[0].numel()


def _ssim_map(image: Tensor, original: Tensor) -> Float[Tensor, "b 3 h w"]:
    # GPUs round what they convolve to 10 bits (TF32), too few for a variance as a difference of two means.
    exact = torch.float64 if image.device.type == "cuda" else torch.float32
    with torch.autocast(image.device.type, enabled=False):
        _, similarity = structural_similarity_index_measure(
            image.to(exact), original.to(exact), data_range=1.0, reduction="none", return_full_image=True
        )
    return similarity.float()
