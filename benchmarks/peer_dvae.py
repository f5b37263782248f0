"""DALLE-pytorch's dVAE, trained as its own `train_vae.py` does, to compare ours with."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import peer
import torch
from torch import Tensor, nn


def build(image_size: int) -> nn.Module:
    """Its `DiscreteVAE` at downsampling 8 with 8192 codes: its script's defaults, but as wide as in its README.

    The script's own default width, `--hidden_dim 256`, has ten times the work in its convolutions.

    Raises: FileNotFoundError if it is not installed.
    """
    module = peer.dalle_pytorch()
    return module.DiscreteVAE(
        image_size=image_size, num_tokens=8192, num_layers=3, codebook_dim=512, hidden_dim=64, num_resnet_blocks=2
    )


class Trainer:
    """The loop of `train_vae.py` with its defaults: Adam, 1e-3 times 0.98 every 100 updates, temperature 1 to 0.5.

    The script counts to 100 within an epoch, so that with few pictures it decays at the start of each; here as meant.
    """

    def __init__(self, model: nn.Module) -> None:
        """Train `model`."""
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.98)
        self.temperature = 1.0
        self.step = 0

    def update(self, image: Tensor) -> float:
        """One update; returns the loss."""
        loss = self.model(image, return_loss=True, return_recons=True, temp=self.temperature)[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.step % 100 == 0:
            self.temperature = max(self.temperature * math.exp(-1e-6 * self.step), 0.5)
            self.schedule.step()
        self.step += 1
        return float(loss.detach())

    def train(self, batches: Iterable[Tensor], *, seconds: float) -> Iterator[tuple[float, float]]:
        """Train for so long; yields the share of the time that is over, and the loss, after every update."""
        started = time.monotonic()
        for image in batches:
            loss = self.update(image)
            over = (time.monotonic() - started) / seconds
            yield min(over, 1.0), loss
            if over >= 1:
                return


@torch.no_grad()
def reconstruct(model: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (b, gh * gw) and hard reconstructions in [0, 1]; it trains on pictures in [-1, 1]."""
    model.eval()
    tokens = model.get_codebook_indices(image)
    reconstruction = (model.decode(tokens) * 0.5 + 0.5).clamp(0, 1)
    model.train()
    return tokens, reconstruction
