"""Keeps a run's `status.json` up to date."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from dalle1.run_status import EVERY_SECONDS, STATUS, RunStatus, State, write_status
from dalle1.training.bad_updates import ReturnToCheckpointError
from dalle1.training.best_checkpoint import BestCheckpoint
from dalle1.training.disk_full import going_on_if_disk_is_full
from dalle1.training.stop_signals import RunStoppedError


class StatusFile(pl.Callback):
    """Writes where the run is into `status.json`: every ten seconds, and whenever it begins something else."""

    def __init__(self, directory: str) -> None:
        """Write into `directory`, from the first device."""
        self._directory = directory
        self._started = self._written = 0.0
        self._first_step = 0
        self._checkpoint: tuple[int, float] | None = None
        self._known: dict[str, float | None] = {}  # metrics of training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training begins or goes on."""
        self._started, self._first_step, self._checkpoint = time.time(), trainer.global_step, None
        self._write(trainer, pl_module, "training")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write if it is time."""
        if time.time() - self._written >= EVERY_SECONDS:
            self._write(trainer, pl_module, "training")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation begins; that of the last step belongs to a run that is complete."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._write(trainer, pl_module, "validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training goes on; or all is done, and the last validation may have been the best."""
        self._write(trainer, pl_module, "training" if trainer.state.fn == TrainerFn.FITTING else "complete")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """A checkpoint is being written."""
        self._checkpoint = trainer.global_step, time.time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All updates are done, or a signal has ended the run."""
        self._write(trainer, pl_module, "complete" if trainer.global_step >= trainer.max_steps else "stopped")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The run ends with an error, by Ctrl-C, or by a signal during a validation."""
        if isinstance(exception, KeyboardInterrupt | RunStoppedError):
            self._write(trainer, pl_module, "stopped")
        elif not isinstance(exception, ReturnToCheckpointError):
            self._write(trainer, pl_module, "failed", error=f"{type(exception).__name__}: {exception}")

    def _write(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: State, error: str | None = None
    ) -> None:
        if not trainer.is_global_zero:
            return
        now, step = time.time(), trainer.global_step
        self._started = self._started or now
        self._written = now
        n_done = step - self._first_step
        pace = (now - self._started) / n_done if n_done else None
        best = next((each for each in trainer.callbacks if isinstance(each, BestCheckpoint)), None)  # type: ignore[attr-defined]
        if trainer.state.fn == TrainerFn.FITTING:  # of the last validation Lightning knows nothing else
            self._known = {name: _number(value) for name, value in trainer.callback_metrics.items()}
        status = RunStatus(
            stage=type(pl_module).__name__.removesuffix("Module").lower(),
            state=state,
            step=step,
            max_steps=trainer.max_steps,
            loss=self._known.get("train/loss"),
            samples_per_second=self._known.get("perf/samples_per_second"),
            data_wait=self._known.get("perf/data_wait"),
            mfu=self._known.get("perf/mfu"),
            seconds_left=None if pace is None else round(pace * (trainer.max_steps - step), 1),
            checkpoint_step=None if self._checkpoint is None else self._checkpoint[0],
            checkpoint_time=None if self._checkpoint is None else self._checkpoint[1],
            best_value=best.value if best else None,
            best_step=best.step if best and best.value is not None else None,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._started,
            updated=now,
            error=error,
        )
        with going_on_if_disk_is_full(Path(self._directory, STATUS)):
            write_status(self._directory, status)


def _number(value: Any) -> float | None:
    """JSON has no numbers that are not finite."""
    return float(value) if math.isfinite(float(value)) else None
