"""Errors of pictures: closed forms, and an independent SSIM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dalle1.evaluation import image_quality
from dalle1.evaluation.image_quality import psnr_db, squared_error, ssim


def pair(*shape: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.rand(shape, generator=generator)
    return (original + noise * torch.randn(shape, generator=generator)).clamp(0, 1), original


def test_psnr_of_a_constant_difference() -> None:
    # -10 log10(0.1^2) = 20, -10 log10(0.01^2) = 40
    difference = torch.tensor([0.1, 0.01])[:, None, None, None]
    error = squared_error(torch.full((2, 3, 4, 5), 0.5) + difference, torch.full((2, 3, 4, 5), 0.5))
    torch.testing.assert_close(error, torch.tensor([1e-2, 1e-4]), rtol=1e-4, atol=0)
    torch.testing.assert_close(psnr_db(error), torch.tensor([20.0, 40.0]), rtol=1e-4, atol=0)


def test_psnr_of_equal_and_of_opposite_pictures_are_its_bounds() -> None:
    black, white = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert float(psnr_db(squared_error(black, black))) == 100
    assert float(psnr_db(squared_error(black, white))) == 0


def independent_ssim(image: np.ndarray, original: np.ndarray) -> float:
    """Mean over pixels of one channel; Wang et al. 2004, eq. 13, with a Gaussian window of 11 pixels."""

    def blur(values: np.ndarray) -> np.ndarray:
        # truncate * sigma = 5 pixels to each side; scipy's "mirror" does not repeat the edge, as torch's "reflect".
        return gaussian_filter(values.astype(np.float64), 1.5, truncate=5 / 1.5, mode="mirror")

    mean_x, mean_y = blur(image), blur(original)
    var_x, var_y = blur(image**2) - mean_x**2, blur(original**2) - mean_y**2
    covariance = blur(image * original) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    quotient = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((quotient / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


@pytest.mark.parametrize("size", [(11, 11), (16, 27)])
def test_ssim_equals_an_independent_one(size: tuple[int, int]) -> None:
    image, original = pair(2, 3, *size)
    expected = [
        np.mean([independent_ssim(image[i, channel].numpy(), original[i, channel].numpy()) for channel in range(3)])
        for i in range(2)
    ]
    # The tolerance is that of fp32 variances, which are differences of means near 1.
    torch.testing.assert_close(ssim(image, original), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-5)


@pytest.mark.parametrize("height", [22, 23, 47])
def test_ssim_by_strips_is_that_of_the_whole(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image, original = pair(2, 3, height, 16)
    whole = ssim(image, original)
    monkeypatch.setattr(image_quality, "_STRIP_VALUES", 1)
    torch.testing.assert_close(ssim(image, original), whole)


def test_ssim_of_equal_pictures_is_one_and_falls_with_noise() -> None:
    image, original = pair(1, 3, 16, 20, noise=0.3)
    less, _ = pair(1, 3, 16, 20, noise=0.05)
    torch.testing.assert_close(ssim(original, original), torch.ones(1))
    assert float(ssim(image, original)) < float(ssim(less, original)) < 1


def test_ssim_does_not_depend_on_the_batch() -> None:
    image, original = pair(3, 3, 12, 16)
    each = torch.cat([ssim(image[i : i + 1], original[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ssim(image, original), each)


def test_ssim_keeps_its_precision_in_autocast() -> None:
    image, original = pair(1, 3, 16, 16, noise=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim(image, original)
    assert torch.equal(inside, ssim(image, original))


def test_ssim_of_pictures_below_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match="SSIM needs sides of at least 11 pixels, got 10x40"):
        ssim(*pair(1, 3, 10, 40))
