"""Losses against closed forms and the paper's own numbers."""

from __future__ import annotations

import math

import pytest
import torch

from dalle1.losses import (
    contrastive_loss,
    logit_laplace_nll,
    masked_mean,
    negative_elbo,
)


def _parameters(location: float, log_scale: float, side: int = 1) -> torch.Tensor:
    return torch.tensor([location] * 3 + [log_scale] * 3)[None, :, None, None].expand(1, 6, side, side)


def test_nll_at_one_half_is_minus_ln_2() -> None:
    nll = logit_laplace_nll(torch.full((1, 3, 1, 1), 0.5), _parameters(0.0, 0.0))
    torch.testing.assert_close(nll, torch.full((1, 3, 1, 1), -math.log(2)))


@pytest.mark.parametrize(("location", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-0.7, 0.5)])
def test_density_integrates_to_one(location: float, log_scale: float) -> None:
    # Midpoints of 200 x 200 equal intervals of (0, 1).
    side = 200
    x = ((torch.arange(side * side) + 0.5) / side**2).view(1, 1, side, side).expand(1, 3, side, side)
    density = torch.exp(-logit_laplace_nll(x, _parameters(location, log_scale, side)))
    assert density.mean().item() == pytest.approx(1, abs=1e-3)


def test_nll_with_a_floor_takes_smaller_scales_as_the_floor() -> None:
    mapped = torch.full((1, 3, 1, 1), 0.3)
    narrow = logit_laplace_nll(mapped, _parameters(0.0, -9.0), min_log_scale=-2.0)
    assert torch.equal(narrow, logit_laplace_nll(mapped, _parameters(0.0, -2.0)))


def test_nll_of_half_precision_is_computed_in_single() -> None:
    nll = logit_laplace_nll(torch.full((1, 3, 1, 1), 0.5).bfloat16(), _parameters(0.0, 0.0).bfloat16())
    assert nll.dtype == torch.float32


def test_kl_of_a_position_counts_one_192nd_at_the_papers_size() -> None:
    kl = torch.full((1, 32, 32), 2.0)
    loss = negative_elbo(torch.zeros(1, 3, 256, 256), kl, kl_weight=6.6)
    assert loss.item() == pytest.approx(6.6 * 2 / 192)


def test_negative_elbo_does_not_depend_on_the_batch_size() -> None:
    nll, kl = torch.randn(1, 3, 8, 8), torch.rand(1, 2, 2)
    one = negative_elbo(nll, kl, kl_weight=3.0)
    four = negative_elbo(nll.expand(4, -1, -1, -1), kl.expand(4, -1, -1), kl_weight=3.0)
    torch.testing.assert_close(one, four)


def test_masked_mean_counts_only_what_is_kept() -> None:
    values = torch.tensor([[1.0, 100.0], [3.0, 100.0]])
    assert masked_mean(values, torch.tensor([[True, False], [True, False]])) == 2
    assert masked_mean(values, torch.zeros(2, 2, dtype=torch.bool)) == 0


def test_contrastive_loss_of_orthogonal_pairs_in_closed_form() -> None:
    # Every row has one similarity 1 (its own) and b - 1 similarities 0.
    b, scale = 4, 2.5
    loss = contrastive_loss(torch.eye(b), torch.eye(b), torch.tensor(scale))
    assert loss.item() == pytest.approx(math.log(math.exp(scale) + b - 1) - scale)


def test_contrastive_loss_is_fp32_under_mixed_precision() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(image, text, torch.tensor(50.0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, contrastive_loss(image, text, torch.tensor(50.0)))


def test_contrastive_loss_is_the_mean_of_both_directions() -> None:
    image = torch.nn.functional.normalize(torch.randn(3, 5), dim=1)
    text = torch.nn.functional.normalize(torch.randn(3, 5), dim=1)
    scale = torch.tensor(7.0)
    rows = [-(scale * image @ text.t())[i].log_softmax(0)[i] for i in range(3)]
    columns = [-(scale * text @ image.t())[i].log_softmax(0)[i] for i in range(3)]
    torch.testing.assert_close(contrastive_loss(image, text, scale), (sum(rows) + sum(columns)) / 6)
