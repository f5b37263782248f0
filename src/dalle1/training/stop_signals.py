"""A run that a scheduler ends saves its state first.

Before they take a machine away, schedulers send SIGTERM (Kubernetes, `scancel`, torchrun) or what they are told to
(`sbatch --signal=USR1@120`), and some seconds later SIGKILL.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from dalle1.training.checkpoints import LastCheckpoint

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class RunStoppedError(Exception):
    """Training has ended early because a signal asked for it; its state is saved."""


class StopSignals(pl.Callback):
    """Ends training with the update in which SIGTERM or SIGUSR1 arrives, on whichever device, and saves its state.

    During a validation it ends with the update after that: the weights are averaged ones meanwhile. Stands after
    `LastCheckpoint`, which does the saving.

    Attributes:
        received: The name of the signal that has ended training, if one has.
    """

    def __init__(self) -> None:
        """Listen while training runs."""
        self.received: str | None = None
        self._signal = 0  # that this process has received; 0 is none
        self._step_before = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, in place of Lightning, which would leave without saving."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        if trainer.world_size > 1:
            # Of CPUs: to ask a GPU would make it wait for every update.
            self._group = torch.distributed.new_group(backend="gloo")
        # What Lightning asks all devices before each batch, for its own handler.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember where the batch begins: only the last one of those whose gradients are added up makes an update."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: if any device has received a signal, save and end on all."""
        if trainer.global_step == self._step_before:
            return
        number = self._signal
        if self._group is not None:
            of_any = torch.tensor([number])
            torch.distributed.all_reduce(of_any, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(of_any)
        if not number or trainer.global_step >= trainer.max_steps:
            return
        self.received = signal.Signals(number).name
        for saver in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(saver, LastCheckpoint):
                saver.save(trainer)
        trainer.limit_val_batches = 0  # there may be no time for the validation that Lightning ends with
        trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen no more."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self.on_train_end(trainer, pl_module)
