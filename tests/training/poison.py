"""A callback that spoils the loss of one update; `+callbacks.poison._target_=poison.Poison` in a run of a test."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

# Of every training batch that this process has made (updates done before it, its keys), and its loss; tests clear them.
BATCHES: list[tuple[int, list[str]]] = []
LOSSES: list[float] = []


class Poison(pl.Callback):
    """Multiplies the loss, once, or notes only which samples come."""

    def __init__(
        self, step: int = -1, factor: float = float("nan"), rank: int = 0, part: int = 0, times: int = 1
    ) -> None:
        """Spoil the batch `part` of the update after `step` on device `rank`, the first so many `times` it is made."""
        self._place = step, part
        self._factor = factor
        self._rank = rank
        self._times = times

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stand between the network and its loss."""
        work = pl_module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = work(batch, batch_idx)
            BATCHES.append((trainer.global_step, batch["key"]))
            is_hit = (trainer.global_step, pl_module.part) == self._place and trainer.global_rank == self._rank
            n_made = sum(step == trainer.global_step for step, _ in BATCHES)
            if is_hit and n_made <= self._times + pl_module.part:
                loss = loss * self._factor
            LOSSES.append(float(loss.detach()))
            return loss

        pl_module.training_step = training_step
