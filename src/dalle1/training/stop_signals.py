"""A run that a scheduler ends saves its state first.

Before they take a machine away, schedulers send SIGTERM (Kubernetes, `scancel`, torchrun) or what they are told to
(`sbatch --signal=USR1@120`), and some seconds later SIGKILL.
"""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch.distributed import ReduceOp

from dalle1.training.checkpoints import LastCheckpoint, is_validation_due

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# Where Lightning has the progress of a validation, and how it knows one that has begun and must begin again.
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class RunStoppedError(Exception):
    """Training has ended early because a signal asked for it; its state is saved."""


class StopSignals(pl.Callback):
    """Ends training with the update or the validation batch in which SIGTERM or SIGUSR1 comes, and saves its state.

    Whichever device receives it, all end together. A validation that was left begins anew when the run goes on. Stands
    after `EMA` and `LastCheckpoint`: the one has put averaged weights in for a validation, the other does the saving.

    Attributes:
        received: The name of the signal that has ended training, if one has.
    """

    def __init__(self) -> None:
        """Listen inside a `with` block, which training stands in."""
        self.received: str | None = None
        self._signal = 0  # that this process has received; 0 is none
        self._step_before = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._handlers: dict[int, Any] = {}
        self._n_common_batches = 0  # of a validation: on every device there are so many
        self._leaves_validation = False

    def __enter__(self) -> StopSignals:
        """Listen, if this is the main thread: others cannot."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep Lightning from listening: it would leave without saving, or wait for the others inside a handler."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find a way to agree with the other devices, be it on the last validation alone."""
        if trainer.world_size > 1:
            # Of CPUs: to ask a GPU would make it wait for every update.
            self._group = torch.distributed.new_group(backend="gloo")
        # What Lightning asks all devices before each batch, for its own handler.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number

    def _of_all(self, number: int, operation: ReduceOp.RedOpType) -> int:
        """A number that all devices agree on."""
        if self._group is None:
            return number
        agreed = torch.tensor([number])
        torch.distributed.all_reduce(agreed, operation, group=self._group)
        return int(agreed)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember where the batch begins: only the last one of those whose gradients are added up makes an update."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: if any device has received a signal, save and end on all. A validation asks by itself."""
        if trainer.global_step == self._step_before or is_validation_due(trainer):
            return
        number = self._of_all(self._signal, ReduceOp.MAX)
        if not number or trainer.global_step >= trainer.max_steps:
            return
        self.received = signal.Signals(number).name
        _save(trainer)
        trainer.limit_val_batches = 0  # there may be no time for the validation that Lightning ends with
        trainer.should_stop = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do the same, before the first batch."""
        # Of a stream nobody knows how many: it is asked for here alone.
        n_batches = sum(trainer.num_val_batches)
        self._n_common_batches = self._of_all(0 if math.isinf(n_batches) else int(n_batches), ReduceOp.MIN)
        self._leave_if_asked(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Do the same, after every batch that all devices have."""
        if batch_idx < self._n_common_batches:
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: pl.Trainer) -> None:
        number = self._of_all(self._signal, ReduceOp.MAX)
        if not number:
            return
        self.received = signal.Signals(number).name
        if trainer.state.fn == TrainerFn.FITTING:
            self._leaves_validation = True
            _save(trainer)
        raise RunStoppedError

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Of a validation that is left: it must begin anew, which Lightning does with one that was interrupted."""
        if self._leaves_validation:
            progress = checkpoint["loops"]["fit_loop"][_VALIDATION]
            progress["total"] |= _BEGUN
            progress["current"] |= _BEGUN


def _save(trainer: pl.Trainer) -> None:
    for saver in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(saver, LastCheckpoint):
            saver.save(trainer)
