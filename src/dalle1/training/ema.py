"""An average of the weights over training; sampling and validation use it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from dalle1.checkpoint import EMA_KEY
from dalle1.training.sharding import forget_gathered


class EMA(pl.Callback):
    """Keeps an exponential moving average, in fp32, of the trained network's weights.

    Swapped in during validation; saved in checkpoints under `ema`, where `checkpoint.load_*` prefers it. The decay of
    the n-th copy is (1 + n) / (10 + n) if that is less, or else short runs would average in their start.
    """

    def __init__(self, decay: float, interval: int = 1) -> None:
        """Average the weights after every `interval` updates, >= 1, with `decay` in [0, 1); 0 keeps no average."""
        self.decay = decay
        self.interval = interval
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}
        self._last_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the initial weights, unless a checkpoint has brought an average."""
        device = pl_module.device
        if self.decay and not self._average:
            self._average = {name: weight.detach().float().clone() for name, weight in _weights(pl_module)}
        self._average = {name: tensor.to(device) for name, tensor in self._average.items()}
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average after every `interval` updates (not after a batch that only accumulates)."""
        if not self._average or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        fresh: set[str] = pl_module.fresh_weights  # type: ignore[assignment]
        copies, too_early = divmod(trainer.global_step, self.interval)
        if too_early and not fresh:
            return
        weights = {name: weight.detach().float() for name, weight in _weights(pl_module)}
        # At once: until the next copy, validation and checkpoints would have weights that are no more.
        for name in fresh:
            self._average[name].copy_(weights[name])
        fresh.clear()
        if too_early:
            return
        decay = min(self.decay, (1 + copies) / (10 + copies))
        torch._foreach_lerp_(list(self._average.values()), list(weights.values()), 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate with the average."""
        if not self._average:
            return
        self._trained = {name: weight.detach().clone() for name, weight in _weights(pl_module)}
        _copy_into(pl_module, self._average)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on training where training was."""
        if self._trained:
            _copy_into(pl_module, self._trained)
            self._trained = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the trained weights back if validation was interrupted: a checkpoint may still be saved."""
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the average to the checkpoint; the `state_dict` holds the trained weights even during validation."""
        checkpoint[EMA_KEY] = {name: tensor.detach().clone() for name, tensor in self._average.items()}
        for name, weight in self._trained.items():
            checkpoint["state_dict"][f"model.{name}"] = weight

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue the average of the checkpoint."""
        self._average = {name: tensor.clone() for name, tensor in checkpoint[EMA_KEY].items()}


def _weights(pl_module: pl.LightningModule) -> list[tuple[str, Tensor]]:
    """The weights that training changes, by their names in the network; where it is sharded, this device's parts."""
    forget_gathered(pl_module)
    network: torch.nn.Module = pl_module.model  # type: ignore[assignment]
    return [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]


@torch.no_grad()
def _copy_into(pl_module: pl.LightningModule, values: dict[str, Tensor]) -> None:
    for name, weight in _weights(pl_module):
        weight.copy_(values[name])
