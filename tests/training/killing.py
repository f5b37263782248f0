"""A callback that kills its own process; `+callbacks.kill._target_=killing.KillAt` in a run that a test starts."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytorch_lightning as pl


class KillAt(pl.Callback):
    """Sends this process a signal before the batch that follows update `step`, if it is device `rank`."""

    def __init__(self, step: int, rank: int = 0, number: int = signal.SIGTERM) -> None:
        """Send signal `number`."""
        self._step = step
        self._rank = rank
        self._number = number

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Send it."""
        if trainer.global_step == self._step and trainer.global_rank == self._rank:
            os.kill(os.getpid(), self._number)
