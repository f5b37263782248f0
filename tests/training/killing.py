"""Callbacks for runs that a test starts: `+callbacks.kill._target_=killing.KillAt`."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
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


class SignalStarter(pl.Callback):
    """Sends a signal to who has started this process, before the batch that follows update `step`."""

    def __init__(self, step: int, number: int = signal.SIGTERM, generations: int = 1) -> None:
        """Send signal `number` to the parent, or to the parent's parent of 2 generations."""
        self._step = step
        self._number = number
        self._generations = generations

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Send it."""
        if trainer.global_step == self._step:
            psutil.Process().parents()[self._generations - 1].send_signal(self._number)


class KillSometime(pl.Callback):
    """Kills this process, as a machine that fails does, at a moment that `seed` decides.

    That is up to `after` seconds after training has begun, or up to 20 ms after a checkpoint has begun to be saved."""

    def __init__(self, seed: int, rank: int = 0, after: float | None = None) -> None:
        """Kill device `rank`; without `after` in a checkpoint."""
        self._random = random.Random(seed)
        self._rank = rank
        self._after = after

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the time."""
        if self._after is not None:
            self._kill_within(trainer, self._after)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set the time."""
        if self._after is None:
            self._kill_within(trainer, 0.02)

    def _kill_within(self, trainer: pl.Trainer, seconds: float) -> None:
        if trainer.global_rank == self._rank:
            timer = threading.Timer(self._random.uniform(0, seconds), os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()


class NoteWeights(pl.Callback):
    """Writes the hash of this device's weights into `weights-rank<rank>.json` when training ends."""

    def __init__(self, directory: str) -> None:
        """Write into `directory`."""
        self._directory = Path(directory)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write."""
        sha256 = weights_sha256(pl_module.model.state_dict())  # type: ignore[operator, union-attr, arg-type]
        write_json(self._directory / f"weights-rank{trainer.global_rank}.json", {"sha256": sha256})
