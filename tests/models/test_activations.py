"""The sigmoid approximation of GELU."""

from __future__ import annotations

import torch

from dalle1.models.activations import QuickGELU


def test_quick_gelu_is_x_times_sigmoid_of_1_702_x_and_so_is_its_gradient() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul_(5).requires_grad_(True)
    expected = x * torch.sigmoid(1.702 * x)
    got = QuickGELU()(x)
    torch.testing.assert_close(got, expected)
    upstream = torch.linspace(-1, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, x, upstream), torch.autograd.grad(expected, x, upstream))


def test_quick_gelu_leaves_its_input_alone() -> None:
    x = torch.tensor([-1.0, 2.0])
    QuickGELU()(x)
    assert x.tolist() == [-1.0, 2.0]
