"""Attention over the whole stream under one pattern: one interface, three implementations of it.

| backend | what it does | where |
|---|---|---|
| `dense` | PyTorch's `scaled_dot_product_attention` under an (s, s) mask | anywhere; tests compare the others with it |
| `local` | blocks of queries and windows of keys, see `local_attention` | anywhere; best on a CPU |
| `flex` | PyTorch's FlexAttention, see `flex_attention` | CUDA |

`auto` is `flex` on CUDA (with heads of 16 dimensions or more); elsewhere `local`, or `dense` for short streams. All
compute the same function; only rounding differs.

Shapes: b batch, s states, h heads, e head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.flex_attention import FlexAttention
from dalle1.models.local_attention import LocalAttention
from dalle1.models.options import AttentionBackend, AttentionPattern

# Queries, keys and values of all states, (b, s, 3, h, e), to weighted values, (b, s, h, e).
Attend = Callable[[Tensor], Tensor]

_FLEX_HEAD_DIM = 16  # the smallest that its kernels multiply
_LOCAL_STATES = 300  # with fewer it is faster to multiply all with all, measured on an x86 CPU


class DenseAttention:
    """The reference: every query against every key, under a mask."""

    def __init__(self, layout: StreamLayout, pattern: AttentionPattern, device: torch.device) -> None:
        """Build the mask on `device`, where all calls must be."""
        self._mask = layout.mask(pattern).to(device)

    def __call__(self, qkv: Float[Tensor, "b s 3 h e"]) -> Float[Tensor, "b s h e"]:
        """Weighted values of each state."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask).transpose(1, 2)


class CausalAttention:
    """What every pattern that hides nothing comes to: no mask has to be read."""

    def __call__(self, qkv: Float[Tensor, "b s 3 h e"]) -> Float[Tensor, "b s h e"]:
        """Weighted values of each state."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def resolve_backend(
    backend: AttentionBackend, device: torch.device, *, head_dim: int, n_states: int
) -> AttentionBackend:
    """What `auto` means for heads and streams of these sizes on a device.

    Raises: ValueError if `backend` cannot train there.
    """
    can_flex = device.type == "cuda" and head_dim >= _FLEX_HEAD_DIM
    if backend == "auto":
        if can_flex:
            return "flex"
        return "local" if n_states >= _LOCAL_STATES else "dense"
    if backend == "flex" and not can_flex:
        # Elsewhere PyTorch's FlexAttention has no backward pass.
        raise ValueError(
            f"attention_backend=flex must run on a CUDA device with heads of at least {_FLEX_HEAD_DIM} dimensions, got "
            f"{device.type} and {head_dim}; use attention_backend=auto"
        )
    return backend


def build_attention(
    layout: StreamLayout, pattern: AttentionPattern, backend: AttentionBackend, device: torch.device
) -> Attend:
    """The attention of layers of one pattern, for calls on `device`; `backend` must be a resolved one.

    A pattern that hides no earlier state is causal attention whatever the backend: PyTorch's own kernels do it best.
    """
    if backend == "dense":
        return DenseAttention(layout, pattern, device)
    if layout.hides_nothing(pattern):
        return CausalAttention()
    return (LocalAttention if backend == "local" else FlexAttention)(layout, pattern, device)
