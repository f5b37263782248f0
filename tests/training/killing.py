"""A callback that kills its own process; `+callbacks.kill._target_=killing.KillAt` in a run that a test starts."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytorch_lightning as pl


class KillAt(pl.Callback):
    """Sends this process a signal before the batch that follows update `step`, if it is device `rank`.

    With a number of a validation `batch`, in the validation after that update, before that batch."""

    def __init__(self, step: int, rank: int = 0, number: int = signal.SIGTERM, batch: int | None = None) -> None:
        """Send signal `number`."""
        self._step = step
        self._rank = rank
        self._number = number
        self._batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Send it."""
        if self._batch is None:
            self._kill(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Send it."""
        if self._batch == batch_idx:
            self._kill(trainer)

    def _kill(self, trainer: pl.Trainer) -> None:
        if trainer.global_step == self._step and trainer.global_rank == self._rank:
            os.kill(os.getpid(), self._number)
