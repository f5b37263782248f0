"""Residual branches in fp16, each with a gradient scale of its own (Ramesh et al. 2021, sec. 2.4, fig. 4, app. D).

Gradients of activations shrink from the last layer of a deep transformer to its first by more than the range of fp16,
so no single loss scale fits all. Here the identity path stays in fp32 in both directions, and a resblock (one residual
branch: the attention or the MLP of a layer) multiplies the gradient that enters its backward pass by its own scale:

    backward:  g ──┬────────────────────────────────────────────────────► + ──► g of the layer below, fp32
                   └─► · scale ─► fp16 ─► the branch's backward ─► fp32 ─► Inf, NaN to 0 ─► / scale

The filter before the division keeps an overflow from the resblocks below, whose scales it does not concern. Gradients
of a branch's weights carry its scale until `ResblockScaling.unscale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

# All numbers: paper, app. D. Its scales also have a factor M, the number of devices, because its loss is divided by the
# batch of all of them. A device's loss is divided by its own batch here: M is in the gradient already.
START_SCALE = 2.0**13
SMALLEST_SCALE, LARGEST_SCALE = 2.0**7, 2.0**24
GROWTH = 2 ** (1 / 1000)  # after each update
SHRINKAGE = 2**-0.5  # after an overflow
# At least so many updates lie between two shrinkages of the same scale.
UPDATES_BETWEEN_SHRINKAGES = 125


class _Enter(torch.autograd.Function):
    """Identity; its backward takes the scale out of the gradient that a branch gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return torch.nan_to_num(gradient.float(), nan=0.0, posinf=0.0, neginf=0.0) / scale, None


class _Leave(torch.autograd.Function):
    """Cast to fp32; its backward gives the branch the scaled gradient in the branch's own type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.dtype = y.dtype
        return y.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return (gradient * scale).to(ctx.dtype), None


class ResblockScale:
    """The scale of one resblock, for `residual`."""

    def __init__(self, scaling: ResblockScaling, index: int) -> None:
        self._scaling = scaling
        self._index = index

    def enter(self, x: Tensor) -> Tensor:
        """`x`, fp32, as the input of the branch."""
        return _Enter.apply(x, self._scaling.scales[self._index])  # type: ignore[no-untyped-call]

    def leave(self, y: Tensor) -> Tensor:
        """Output of the branch as fp32."""
        return _Leave.apply(y, self._scaling.scales[self._index])  # type: ignore[no-untyped-call]


def residual(x: Tensor, branch: Callable[[Tensor], Tensor], scale: ResblockScale | None) -> Tensor:
    """The sum x + branch(x); with a scale the branch runs in fp16 under autocast. Weights and `x` stay in fp32."""
    if scale is None:
        return x + branch(x)
    with torch.autocast(x.device.type, torch.float16):
        y = branch(scale.enter(x))
    return x + scale.leave(y)


class ResblockScaling(nn.Module):
    """Scales of all resblocks: what they are, when they change, and which updates they cost.

    A module for its buffers, which move, are saved and are loaded with the network that is trained.
    """

    scales: Float[Tensor, " resblocks"]
    updates_since_shrinkage: Tensor  # int64, (resblocks,); skipped ones count
    skipped_updates: Tensor  # int64, of the whole run

    def __init__(self, weights: Sequence[Sequence[nn.Parameter]]) -> None:
        """Scale resblocks that have these `weights`, one sequence for each."""
        super().__init__()
        self._weights = [list(part) for part in weights]
        self.register_buffer("scales", torch.full((len(weights),), START_SCALE))
        never = torch.full((len(weights),), UPDATES_BETWEEN_SHRINKAGES)
        self.register_buffer("updates_since_shrinkage", never)
        self.register_buffer("skipped_updates", torch.tensor(0))

    def resblock(self, index: int) -> ResblockScale:
        """The scale of one of them, for `residual`."""
        return ResblockScale(self, index)

    def by_weight(self) -> dict[nn.Parameter, Tensor]:
        """The scale that each weight's gradient has until `unscale`: views of `scales` where they are now."""
        return {weight: self.scales[index] for index, weights in enumerate(self._weights) for weight in weights}

    @torch.no_grad()
    def unscale(self) -> bool:
        """Take the scales out of the gradients, adapt them, and return whether the update can be made.

        It cannot if a gradient is not finite; True nevertheless if the scale of its resblock is as small as it may be,
        where skipping would not help. Gradients must be those of all ranks together, which then decide alike.
        """
        overflown = torch.zeros_like(self.scales)
        inverse = 1 / self.scales
        for index, weights in enumerate(self._weights):
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            # What torch's GradScaler uses: multiplies and looks for Inf and NaN in one pass.
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, overflown[index], inverse[index])
        is_hopeless = bool((overflown.bool() & (self.scales <= SMALLEST_SCALE)).any())
        return self.adapt(overflown.bool()) or is_hopeless

    @torch.no_grad()
    def adapt(self, overflown: Bool[Tensor, " resblocks"]) -> bool:
        """Change the scales after the gradients of an update; False if any has `overflown`: the update is skipped.

        Scales grow with every update that is made. When one is skipped, those that have overflown shrink, unless they
        did so a short while ago, and the others stay."""
        can_be_made = not bool(overflown.any())
        if can_be_made:
            self.scales.mul_(GROWTH)
        else:
            shrinks = overflown & (self.updates_since_shrinkage >= UPDATES_BETWEEN_SHRINKAGES)
            self.scales.copy_(torch.where(shrinks, self.scales * SHRINKAGE, self.scales))
            self.updates_since_shrinkage.masked_fill_(shrinks, 0)
            self.skipped_updates += 1
        self.scales.clamp_(SMALLEST_SCALE, LARGEST_SCALE)
        self.updates_since_shrinkage += 1
        return can_be_made
