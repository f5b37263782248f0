"""Copies of layers to decode with; most of this is the form for a CPU, where rows are few, again and again.

`F.linear` lays a weight out anew at every call, which takes longer than the product when there are few rows; here it is
done once. Measured on an x86 CPU, two threads, torch 2.13, beside other work: for 16 rows of a 512 x 1536 layer 91
instead of 46 GFLOP/s, for 32 rows 129 instead of 55. A second property is worth as much: a row's result has the same
bits whether 2 or 300 rows are multiplied at once (one alone differs), so what is sampled does not depend on how many
candidates there are.
"""

from __future__ import annotations

import copy
import platform
from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import Tensor, nn

from dalle1.models.activations import QuickGELU

# Elementwise functions work on vectors of numbers and then one by one, in other bits, on what is left, in every
# thread's part of the whole. The widest vectors hold 16 numbers, taken two at a time; fewer numbers than this grain are
# not divided among threads (`at::internal::GRAIN_SIZE`).
_VECTOR, _GRAIN = 32, 32768


class PackedLinear(nn.Module):
    """A linear layer's copy for inference on a CPU in fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        """Lay out the weight of `linear`, which keeps its own."""
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


class RowwiseActivation(nn.Module):
    """An elementwise function under which a row has the same bits in any company."""

    def __init__(self, activation: nn.Module) -> None:
        """Apply `activation`."""
        super().__init__()
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Same shape, (..., width)."""
        rows = x.flatten(0, -2)
        width = rows.shape[-1]
        size = max(1, (_GRAIN - 1) // width) if width % _VECTOR == 0 else 1
        parts = [self._activation(part) for part in rows.split(size)]  # type: ignore[no-untyped-call]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view_as(x)


def can_pack(model: nn.Module) -> bool:
    """Whether PyTorch can do it, and it was measured there: weights in fp32 on an x86 CPU."""
    operators = torch.ops.mkldnn
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        # They are not promised to stay.
        and hasattr(operators, "_linear_pointwise")
        and hasattr(operators, "_reorder_linear_weight")
        and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in model.parameters())
    )


def pack(module: nn.Module) -> nn.Module:
    """A copy of `module` that shares its weights, but for those of linear layers, which are there a second time.

    Hooks and what was compiled stay with the original."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module)
    if isinstance(module, QuickGELU | nn.GELU):
        return RowwiseActivation(module)
    return with_children(module, {name: pack(child) for name, child in module.named_children()})


def with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A copy of `module` that shares all it has but these children and its hooks."""
    packed = copy.copy(module)
    packed._modules = {**module._modules, **children}
    packed._forward_hooks, packed._forward_pre_hooks = OrderedDict(), OrderedDict()
    packed._compiled_call_impl = None
    return packed


def in_type(module: nn.Module, dtype: torch.dtype | None, *, but: Collection[str] = ()) -> nn.Module:
    """A copy of `module` with weights of another type; those that are of this type already are shared.

    The children in `but` keep their type; without `dtype` all do. Hooks and what was compiled stay with the original.
    """
    children = {name: in_type(child, None if name in but else dtype) for name, child in module.named_children()}
    copied = with_children(module, children)
    copied._parameters = {
        name: None if weight is None else nn.Parameter(weight.detach().to(dtype or weight.dtype), requires_grad=False)
        for name, weight in module._parameters.items()
    }
    return copied
