"""Sparse attention on CUDA through PyTorch's FlexAttention.

The kernels skip tiles of 128 x 128 scores of which a mask allows nothing. In raster order a column touches every tile;
so column layers take the image states column by column, and only tiles of text and on the diagonal are left.

Shapes: b batch, s states, h heads, e head_dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.compilation import prepare_compiler
from dalle1.models.options import AttentionPattern


@cache
def _compiled() -> Any:
    prepare_compiler()
    # Uncompiled, FlexAttention computes all scores: better an error than that. Lengths never change within a run.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


class _Reorder(torch.autograd.Function):
    """States in another order; the gradient is a gather too, where that of `index_select` adds into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


class FlexAttention:
    """Attention of one pattern over a whole stream."""

    def __init__(self, layout: StreamLayout, pattern: AttentionPattern, device: torch.device) -> None:
        """Make the mask on `device`, where all calls must be."""
        self.layout = layout
        self.pattern = pattern
        self.column_major = pattern == "column"
        order = torch.tensor(layout.order(column_major=self.column_major))
        self._order, self._inverse = order.to(device), order.argsort().to(device)
        length = layout.n_states
        self.block_mask = create_block_mask(self.mask_mod(device), None, None, length, length, device=str(device))

    def __call__(self, qkv: Float[Tensor, "b s 3 h e"]) -> Float[Tensor, "b s h e"]:
        """Weighted values of each state."""
        if self.column_major:
            qkv = _Reorder.apply(qkv, self._order, self._inverse)  # type: ignore[no-untyped-call]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # The compiled function inside a compiled block would be traced all the same.
        attend = flex_attention if torch.compiler.is_compiling() else _compiled()
        y: Tensor = attend(q, k, v, block_mask=self.block_mask).transpose(1, 2)
        if not self.column_major:
            return y
        reordered: Tensor = _Reorder.apply(y, self._inverse, self._order)  # type: ignore[no-untyped-call]
        return reordered

    def mask_mod(self, device: torch.device) -> Any:
        """The mask as a function of (batch, head, query, key), positions in the order that the kernel sees."""
        text, height = self.layout.text_states, self.layout.grid_height
        offsets = self.layout.offsets(self.pattern)
        contiguous = offsets == tuple(range(len(offsets)))
        longest = offsets[-1]
        allowed = torch.zeros(self.layout.grid_height * self.layout.grid_width, dtype=torch.bool)
        allowed[list(offsets)] = True
        allowed = allowed.to(device)
        column_major = self.column_major

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            offset = query - key
            if column_major:
                near = (query - text) // height == (key - text) // height
            elif contiguous:
                near = offset <= longest
            else:
                near = allowed[offset.clamp(min=0, max=len(allowed) - 1)]
            return (offset >= 0) & ((key < text) | near)

        return mask_mod
