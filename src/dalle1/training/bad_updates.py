"""Updates that go wrong: found before the weights change, named, and left out."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor

from dalle1.atomic_files import write_json
from dalle1.data.fields import require_int
from dalle1.training.best_checkpoint import BestCheckpoint
from dalle1.training.checkpoints import LastCheckpoint
from dalle1.training.disk_full import going_on_if_disk_is_full
from dalle1.training.loss_watch import LossWatch

logger = logging.getLogger(__name__)

Action = Literal["skip", "return", "stop"]
LOG, RETURN = "bad_updates.jsonl", "return.json"
_WITHIN = 1000  # updates among which `max_bad_updates` counts
_MOST_NAMED = 8  # samples of each device in the line that is logged; all are in the file
# Where a loader stands in the data; what else its state holds belongs to the checkpoint. See `data.loader`, `.stream`.
_POSITION = ("samples_handed_out", "visits", "findings")


class ReturnToCheckpointError(Exception):
    """An update was bad: the run begins again at its newest checkpoint. All devices raise it together."""


class BadUpdates(pl.Callback):
    """Decides, on all devices alike, whether an update is bad, and what becomes of it.

    Bad is an update whose loss (mean over devices and over the batches it accumulates) or gradient norm is not finite,
    or whose loss has exploded (`LossWatch`). Its line is logged and, with the keys of all samples, added to
    `bad_updates.jsonl`. Then, by `action`:

    - `skip` throws the gradient away; the step counts for the schedule, the average and `max_steps` all the same;
    - `return` goes back to the newest checkpoint and on from there with the data after the bad update, so that the
      samples between the two are left out (Chowdhery et al. 2022, sec. 5.1, left out some hundred batches around a
      spike); before the first checkpoint it skips. Where to go on in the data is kept beside the checkpoint until
      a newer one is there, so that the run may be stopped meanwhile;
    - `stop` ends the run with an error.

    Attributes:
        count: Bad updates of this run so far.
    """

    def __init__(
        self,
        directory: str,
        *,
        action: Action = "skip",
        max_bad_updates: int = 10,
        loss_window: int = 100,
        loss_threshold: float | None = 20.0,
    ) -> None:
        """Judge every update.

        Args:
            directory: Of the run; its checkpoints are in `checkpoints`.
            action: What becomes of a bad update.
            max_bad_updates: So many may be among the last 1000; one more ends the run, >= 0.
            loss_window: Good updates whose losses the next one is compared with, >= 2.
            loss_threshold: Deviations above their mean from which on a loss has exploded, > 0; None: it never has.

        Raises: TypeError or ValueError for other options.
        """
        name = "callbacks.bad_updates"
        if action not in get_args(Action):
            raise ValueError(f"{name}.action must be one of {', '.join(get_args(Action))}, got {action!r}")
        require_int(f"{name}.max_bad_updates", max_bad_updates, at_least=0)
        require_int(f"{name}.loss_window", loss_window, at_least=2)
        if loss_threshold is not None and not 0 < loss_threshold < math.inf:
            raise ValueError(f"{name}.loss_threshold must be a finite number > 0 or null, got {loss_threshold}")
        self.count = 0
        self._directory = Path(directory)
        self._action = action
        self._most = max_bad_updates
        self._watch = LossWatch(window=loss_window, threshold=loss_threshold)
        self._recent: list[int] = []  # the bad ones among the last updates, by their numbers, from 1
        self._resumed_at = 0
        self._keys: list[str] = []  # of the samples of the coming update, on this device
        self._loss: Tensor | float = 0.0  # sum over its batches so far

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the module ask before each update."""
        pl_module.bad_updates = self  # type: ignore[assignment]
        self._resumed_at = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which samples the update is made of."""
        if pl_module.part == 0:
            self._keys, self._loss = [], 0.0
        self._keys += batch["key"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add up the loss, which Lightning has divided by the number of batches that are accumulated."""
        self._loss = self._loss + loss.detach().float() * trainer.accumulate_grad_batches

    @property
    def summary(self) -> dict[str, int]:
        """What a run's summary says of it."""
        return {"bad_updates": self.count} if self.count else {}

    def forget_losses(self) -> None:
        """From the coming update on the loss is another one."""
        self._watch.forget()

    def is_bad(self, pl_module: pl.LightningModule, norm: Tensor) -> bool:
        """Whether the update with this gradient norm must be skipped. All devices call it together.

        Raises: ReturnToCheckpointError; ValueError if bad updates, or more of them, are errors.
        """
        trainer, update = pl_module.trainer, pl_module.global_step + 1
        assert isinstance(self._loss, Tensor), "a loss has come before its gradient"
        # The last update of a pass may have fewer batches than others.
        numbers = torch.stack([self._loss / pl_module.part, norm.detach().float()])  # type: ignore[operator]
        if trainer.world_size > 1:
            torch.distributed.all_reduce(numbers)
            numbers /= trainer.world_size
        loss, mean_norm = numbers.tolist()  # the one time that the host waits for the device
        why = self._watch.objection(loss)
        if why is None and not math.isfinite(mean_norm):
            why = "the norm of its gradient is not finite"
        if why is None:
            self._watch.add(loss)
        else:
            self._treat(trainer, update, loss, mean_norm, why)
        pl_module.log("train/bad_updates", float(self.count))
        return why is not None

    def _treat(self, trainer: pl.Trainer, update: int, loss: float, norm: float, why: str) -> None:
        self.count += 1
        self._recent = [each for each in self._recent if each > update - _WITHIN] + [update]
        checkpoint = max([self._resumed_at, *(each.last_saved for each in _callbacks(trainer, LastCheckpoint))])
        returns = self._action == "return" and checkpoint > 0
        ends = self._action == "stop" or len(self._recent) > self._most
        keys: list[Any] = [self._keys]
        if trainer.world_size > 1:
            keys = [None] * trainer.world_size
            torch.distributed.all_gather_object(keys, self._keys)
        said = f"update {update} is bad: {why} (loss {loss:.4g}, gradient norm {norm:.4g})"
        if trainer.is_global_zero:
            done = "the run ends" if ends else f"going back to update {checkpoint}" if returns else "skipped"
            logger.warning("%s; %s; its samples: %s", said, done, _named(keys))
            self._record(update=update, loss=_json(loss), grad_norm=_json(norm), why=why, done=done, keys=keys)
        if ends:
            raise ValueError(self._last_words(said))
        if returns:
            self._note_return(trainer, checkpoint)
            raise ReturnToCheckpointError(said)

    def _last_words(self, said: str) -> str:
        way_out = f"no checkpoint has it: see its samples in '{self._directory / LOG}', or choose a lower"
        if self._action == "stop":
            return f"updates must have a finite loss and gradient, but {said}; {way_out} optim.lr and name="
        return (
            f"at most {self._most} of the last {_WITHIN} updates may be bad (callbacks.bad_updates.max_bad_updates), "
            f"got {len(self._recent)}, and {said}; {way_out} optim.lr and name="
        )

    def _record(self, **line: Any) -> None:
        """Add a line to the file; what a crash has cut off there ends with the line before."""
        path = self._directory / LOG
        with going_on_if_disk_is_full(path), path.open("ab+") as file:
            begins = b""
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                begins = b"" if file.read() == b"\n" else b"\n"
            file.write(begins + json.dumps({"time": time.time(), **line}, ensure_ascii=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _note_return(self, trainer: pl.Trainer, checkpoint: int) -> None:
        """Keep where the run goes on, for itself and for a later start, until there is a newer checkpoint."""
        loader: Any = trainer.train_dataloader
        state = loader.state_dict()  # all devices together
        # What the run knows by now stays known.
        memory = [*_callbacks(trainer, BadUpdates), *_callbacks(trainer, BestCheckpoint)]
        if trainer.is_global_zero:
            content = {
                "step": checkpoint,
                "position": {name: state[name] for name in _POSITION if name in state},
                "callbacks": {each.state_key: each.state_dict() for each in memory},
            }
            path = self._directory / "checkpoints" / RETURN
            with going_on_if_disk_is_full(path):  # without, the same data come again, and at last an error
                write_json(path, content)
        trainer.strategy.barrier("return")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """If the run has gone back to this checkpoint, move on in the data. Called before the state is loaded."""
        path = self._directory / "checkpoints" / RETURN
        if not path.exists():
            return
        noted = json.loads(path.read_text(encoding="utf-8"))
        if noted["step"] != checkpoint["global_step"]:
            return
        for state in checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]:
            state.update(noted["position"])
        checkpoint["callbacks"].update(noted["callbacks"])

    def state_dict(self) -> dict[str, Any]:
        """What to go on from, in plain types."""
        return {"losses": self._watch.state_dict(), "recent": list(self._recent), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._watch.load_state_dict(state_dict["losses"])
        self._recent, self.count = list(state_dict["recent"]), state_dict["count"]


def _callbacks(trainer: pl.Trainer, kind: type[Any]) -> list[Any]:
    return [each for each in trainer.callbacks if isinstance(each, kind)]  # type: ignore[attr-defined]


def _named(keys: list[list[str]]) -> str:
    """The samples of all devices, shortened."""
    lines = []
    for rank, mine in enumerate(keys):
        more = f" and {len(mine) - _MOST_NAMED} more, see {LOG}" if len(mine) > _MOST_NAMED else ""
        where = f"on device {rank} " if len(keys) > 1 else ""
        lines.append(where + ", ".join(mine[:_MOST_NAMED]) + more)
    return "; ".join(lines)


def _json(number: float) -> float | None:
    """JSON has no numbers that are not finite."""
    return number if math.isfinite(number) else None
