"""The checkpoint that validated best."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only

from dalle1.atomic_files import write_json
from dalle1.training.checkpoints import LAST, LastCheckpoint, link
from dalle1.training.disk_full import going_on_if_disk_is_full, save_if_possible

logger = logging.getLogger(__name__)

BEST, BEST_JSON = "best.ckpt", "best.json"
Mode = Literal["min", "max"]


class BestCheckpoint(pl.Callback):
    """Keeps `best.ckpt`, the state after the update that validated best so far, and `best.json`, which says so.

    Where a checkpoint of the same update is saved anyway, it is that file under a second name. Stands after `EMA`,
    which takes the averaged weights out again, and before `LastCheckpoint`, whose checkpoint of this update has to know
    it.

    Attributes:
        value: Best value of the metric, or None.
        step: Update after which it was found.
    """

    def __init__(self, directory: str, *, monitor: str = "val/loss", mode: Mode = "min") -> None:
        """Save into `directory`, beside the other checkpoints, when `monitor` is the least or greatest so far.

        Raises: ValueError for another mode.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"callbacks.best.mode must be min or max, got {mode!r}")
        self.value: float | None = None
        self.step = 0
        self._directory = Path(directory)
        self._monitor = monitor
        self._sign = 1 if mode == "min" else -1

    @property
    def summary(self) -> dict[str, float]:
        """What a run's summary says of it."""
        name = self._monitor.rpartition("/")[2]
        return {} if self.value is None else {f"best_{name}": self.value, "best_step": self.step}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it is the best. Raises: ValueError if there is no such metric; OSError as `LastCheckpoint.save`."""
        if self._monitor not in trainer.callback_metrics:
            if not pl_module.validates_in_full:
                return
            there = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ValueError(f"callbacks.best.monitor must be one of the metrics {there}; got {self._monitor}")
        # Of one device, so that all decide alike even on a metric that is each one's own.
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self._monitor]))
        if not math.isfinite(value) or (self.value is not None and self._sign * value >= self._sign * self.value):
            return
        before = self.value, self.step
        self.value, self.step = value, trainer.global_step  # first: the checkpoint says so
        if not self._save(trainer):
            self.value, self.step = before

    def _save(self, trainer: pl.Trainer) -> bool:
        """Whether `best.ckpt` is there now."""
        savers = [each for each in trainer.callbacks if isinstance(each, LastCheckpoint)]  # type: ignore[attr-defined]
        path = self._directory / BEST
        is_at_end = trainer.state.fn != TrainerFn.FITTING  # the last state is saved before it is validated
        for saver in savers:
            if not is_at_end and saver.is_due(trainer):
                saver.save(trainer)
                if saver.last_saved != trainer.global_step:
                    return False
        if is_at_end or any(saver.last_saved == trainer.global_step for saver in savers):
            rank_zero_only(self._link)(path)
        elif failure := save_if_possible(trainer, path):
            for saver in savers:
                saver.tell_failure(failure)
            return False
        if trainer.is_global_zero:
            with going_on_if_disk_is_full(path.with_name(BEST_JSON)):
                content = {"monitor": self._monitor, "value": self.value, "step": self.step}
                write_json(path.with_name(BEST_JSON), content)
        return True

    def _link(self, path: Path) -> None:
        with going_on_if_disk_is_full(path):
            link(path.with_name(LAST), path)

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"monitor": self._monitor, "value": self.value, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; of another metric nothing is known."""
        if state_dict["monitor"] == self._monitor:
            self.value, self.step = state_dict["value"], state_dict["step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learn of the validation of the update that the run goes on after, if it came after that was saved."""
        path = self._directory / BEST_JSON
        if not path.exists():
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["step"] == trainer.global_step and known["monitor"] == self._monitor:
            self.value, self.step = known["value"], known["step"]
