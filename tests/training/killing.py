"""Callbacks for runs that a test starts: `+callbacks.kill._target_=killing.KillAt`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from dalle1.atomic_files import write_json
from dalle1.checkpoint import weights_sha256


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


class NoteWeights(pl.Callback):
    """Writes the hash of this device's weights into `weights-rank<rank>.json` when training ends."""

    def __init__(self, directory: str) -> None:
        """Write into `directory`."""
        self._directory = Path(directory)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write."""
        sha256 = weights_sha256(pl_module.model.state_dict())  # type: ignore[operator, union-attr, arg-type]
        write_json(self._directory / f"weights-rank{trainer.global_rank}.json", {"sha256": sha256})
