"""Activation functions."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_SLOPE = 1.702  # Child et al. 2019 (sec. 5.2): f(x) = x * sigmoid(1.702 x)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the Sparse Transformer's approximation of GELU."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Elementwise."""
        if torch.compiler.is_compiling():
            return x * torch.sigmoid(_SLOPE * x)  # becomes one pass over memory
        y: Tensor = _QuickGELU.apply(x)  # type: ignore[no-untyped-call]
        return y


class _QuickGELU(torch.autograd.Function):
    """silu(1.702 x) / 1.702 in few passes over memory; its derivative is that of silu at 1.702 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x * _SLOPE
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(_SLOPE)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)
