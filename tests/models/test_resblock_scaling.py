"""Gradient scales of residual branches: arithmetic, overflow, and when a scale changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dalle1.models.resblock_scaling import ResblockScaling, residual

START = 2.0**13


def linear_resblocks(n: int, width: int = 16) -> tuple[list[nn.Linear], ResblockScaling]:
    """Layers as residual branches with a scale each."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(n)]
    return layers, ResblockScaling([list(layer.parameters()) for layer in layers])


def forward(x: Tensor, layers: list[nn.Linear], scaling: ResblockScaling | None) -> Tensor:
    for index, layer in enumerate(layers):
        x = residual(x, layer, scaling.resblock(index) if scaling else None)
    return x


def test_without_a_scale_it_is_the_plain_sum() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    y = residual(x, torch.sin, None)
    assert torch.equal(y, x + x.sin())
    y.sum().backward()
    assert torch.equal(x.grad, 1 + x.cos())


def test_identity_path_is_fp32_and_the_branch_fp16() -> None:
    seen = []

    def branch(x: Tensor) -> Tensor:
        y = layers[0](x)
        seen.append((x.dtype, y.dtype))
        y.register_hook(lambda gradient: seen.append((gradient.dtype, gradient.max().item())))
        return y

    layers, scaling = linear_resblocks(1)
    x = torch.full((1, 16), 1 + 2**-20)  # no fp16 number
    x.requires_grad_()
    layers[0].weight.data.zero_()
    layers[0].bias.data.zero_()
    y = residual(x, branch, scaling.resblock(0))
    assert torch.equal(y, x)
    y.backward(torch.full_like(y, 1 + 2**-20))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 1 + 2**-20))
    assert seen == [(torch.float32, torch.float16), (torch.float16, START)]


def test_gradients_are_those_of_fp32_to_the_accuracy_of_fp16() -> None:
    layers, scaling = linear_resblocks(6)
    x = torch.randn(32, 16, requires_grad=True)
    target = torch.randn(32, 16)
    weights = [weight for layer in layers for weight in layer.parameters()]
    exact = torch.autograd.grad((forward(x, layers, None) - target).square().mean(), [x, *weights])

    (forward(x, layers, scaling) - target).square().mean().backward()
    assert scaling.unscale()
    for mine, expected in zip([x.grad, *(weight.grad for weight in weights)], exact, strict=True):
        # fp16 rounds by 2^-11; a few roundings one after another.
        assert (mine - expected).norm() < 2**-8 * expected.norm()


@pytest.mark.parametrize(("scale", "survives"), [(1.0, False), (START, True)])
def test_gradients_below_the_range_of_fp16_survive_by_their_scale(scale: float, survives: bool) -> None:
    layers, scaling = linear_resblocks(2)
    scaling.scales.fill_(scale)
    (1e-8 * forward(torch.randn(4, 16), layers, scaling)).sum().backward()
    assert scaling.unscale()
    assert bool(layers[0].weight.grad.any()) == survives


def test_overflow_in_one_resblock_is_filtered_from_those_below_and_leaves_the_other_scales_alone() -> None:
    layers, scaling = linear_resblocks(4)
    scaling.scales[2] = 2.0**23  # a gradient of 0.1 becomes infinite in fp16
    before = scaling.scales.clone()
    x = torch.randn(8, 16, requires_grad=True)
    (0.1 * forward(x, layers, scaling)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert [bool(layer.weight.grad.isfinite().all()) for layer in layers] == [True, True, False, True]

    assert not scaling.unscale()
    before[2] *= 2**-0.5
    assert torch.equal(scaling.scales, before)
    assert scaling.skipped_updates == 1


def test_nan_is_filtered_too_and_counts_as_overflow() -> None:
    layers, scaling = linear_resblocks(2)
    x = torch.randn(8, 16, requires_grad=True)

    def broken(x: Tensor) -> Tensor:
        y = layers[1](x)
        y.register_hook(lambda gradient: gradient * float("nan"))
        return y

    y = residual(forward(x, layers[:1], scaling), broken, scaling.resblock(1))
    (0.1 * y).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert not scaling.unscale()
    assert scaling.scales[0] == START > scaling.scales[1]


@pytest.fixture
def make_scaling() -> Callable[[int], ResblockScaling]:
    """Scales without resblocks, for `adapt`."""
    return lambda n: ResblockScaling([[] for _ in range(n)])


def test_scale_doubles_in_a_thousand_updates(make_scaling: Callable[[int], ResblockScaling]) -> None:
    scaling = make_scaling(1)
    for _ in range(1000):
        assert scaling.adapt(torch.tensor([False]))
    assert scaling.scales.item() == pytest.approx(2 * START, rel=1e-4)


def test_scale_shrinks_once_in_125_updates(make_scaling: Callable[[int], ResblockScaling]) -> None:
    scaling = make_scaling(2)
    shrunk_at = []
    for update in range(300):
        before = scaling.scales.clone()
        assert not scaling.adapt(torch.tensor([True, False]))
        if scaling.scales[0] < before[0]:
            assert scaling.scales[0] / before[0] == pytest.approx(2**-0.5)
            shrunk_at.append(update)
    assert shrunk_at == [0, 125, 250]
    assert scaling.scales[1] == START, "an update that is skipped makes none grow"
    # The other one may shrink at any time.
    scaling.adapt(torch.tensor([True, True]))
    assert scaling.scales[1] == pytest.approx(START * 2**-0.5)


def test_scales_stay_in_the_papers_range(make_scaling: Callable[[int], ResblockScaling]) -> None:
    scaling = make_scaling(2)
    scaling.scales.copy_(torch.tensor([2.0**24, 2.0**7.2]))
    scaling.adapt(torch.tensor([False, False]))
    assert scaling.scales[0] == 2.0**24
    scaling.adapt(torch.tensor([False, True]))
    assert scaling.scales[1] == 2.0**7


def test_overflow_at_the_smallest_scale_is_not_skipped() -> None:
    layers, scaling = linear_resblocks(1)
    scaling.scales.fill_(2.0**7)
    (1e6 * forward(torch.randn(4, 16), layers, scaling)).sum().backward()
    assert scaling.unscale(), "so that the check of the gradient stops the run"
    assert not layers[0].weight.grad.isfinite().all()


def test_state_is_saved_and_loaded(make_scaling: Callable[[int], ResblockScaling]) -> None:
    whole = make_scaling(3)
    draw = torch.Generator().manual_seed(0)
    events = torch.rand(200, 3, generator=draw) < 0.02
    for event in events[:77]:
        whole.adapt(event)
    resumed = make_scaling(3)
    resumed.load_state_dict(whole.state_dict())
    for event in events[77:]:
        assert whole.adapt(event) == resumed.adapt(event)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
