"""DALLE-pytorch's transformer, trained as its own `train_dalle.py` does, to compare ours with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peer
import torch
from torch import Tensor, nn

from dalle1.models.options import AttentionPattern

# Its names of our patterns. Not the same ones: its row ends where the line begins, its convolution is a square of 5 x 5
# up and to the left.
_NAMES: dict[AttentionPattern, str] = {
    "row": "axial_row",
    "column": "axial_col",
    "conv": "conv_like",
    "full": "full",
}


def build(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    text_vocab_size: int,
    text_seq_len: int,
    image_vocab_size: int,
    grid_size: int,
    patterns: tuple[AttentionPattern, ...],
    plain: bool = False,
    cacheable: bool = False,
) -> nn.Module:
    """Its `DALLE` with the defaults of that class: rotary embeddings, shifted tokens, MLPs with a gate.

    `plain` is without the first two; in their place it learns embeddings of positions, as ours does. `cacheable`
    computes rows and columns under a mask, which its cache needs ("optimize_for_inference").

    Its dVAE, which it cannot do without, is the smallest that fits; it is given tokens and never calls it.

    Raises: FileNotFoundError if it is not installed.
    """
    module = peer.dalle_pytorch()
    vae = module.DiscreteVAE(
        image_size=64, num_tokens=image_vocab_size, num_layers=1, codebook_dim=1, hidden_dim=1, num_resnet_blocks=0
    )
    vae.image_size = grid_size * 2  # it takes powers of two alone, but the transformer reads nothing else
    return module.DALLE(
        dim=d_model,
        vae=vae,
        num_text_tokens=text_vocab_size,
        text_seq_len=text_seq_len,
        depth=n_layers,
        heads=n_heads,
        dim_head=d_model // n_heads,
        attn_types=tuple(_NAMES[pattern] for pattern in patterns),
        rotary_emb=not plain,
        shift_tokens=not plain,
        optimize_for_inference=cacheable,
    )


class Trainer:
    """The loop of `train_dalle.py` with its defaults: Adam at 3e-4, gradients clipped to norm 0.5."""

    def __init__(self, model: Any) -> None:
        """Train `model`."""
        self.model = model
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.Adam(self._weights, lr=3e-4)

    def update(self, text_tokens: Tensor, image_tokens: Tensor) -> float:
        """One update; returns the loss. Text ids start at 1 there, 0 is padding."""
        loss = self.model(text_tokens, image_tokens, return_loss=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, 0.5)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def sampling_step(
    model: Any, text_tokens: Tensor, image_tokens: Tensor, position: int, *, cached: bool
) -> Callable[[], None]:
    """A step of its `generate_images` when `position` image tokens are there; with `cached` it goes on at each call.

    The cache, which that method drops, is then handed on from call to call. For the clock alone: begun with image
    tokens in it, as here, that cache gives other logits."""
    module = peer.dalle_pytorch()
    cache: dict[str, Any] | None = {} if cached else None
    if cache is not None:
        model(text_tokens, image_tokens[:, : position - 1], cache=cache)
    there = position

    def step() -> None:
        nonlocal there
        logits = model(text_tokens, image_tokens[:, :there], cache=cache)[:, -1, :]
        module.gumbel_sample(module.top_k(logits, thres=0.5), temperature=1.0, dim=-1)
        there += cached

    return step


def count_parameters(model: nn.Module) -> int:
    """Weights that are trained."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
