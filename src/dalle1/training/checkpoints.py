"""A run's checkpoints: written whole or not at all, kept by number, and the newest whole one found again."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only

from dalle1.atomic_files import atomic
from dalle1.checkpoint import DamagedCheckpointError, check_sums, read_checkpoint
from dalle1.data.fields import require_int
from dalle1.sharded_files import is_sharded, read_plain, read_sharded
from dalle1.training.disk_full import (
    describe_full_disk,
    full_disk_error,
    going_on_if_disk_is_full,
    is_disk_full,
    save_if_possible,
)
from dalle1.training.sharded_checkpoints import point_to

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
OnDiskFull = Literal["continue", "stop"]


class LastCheckpoint(pl.Callback):
    """Saves `last.ckpt` every so many updates and after the last one; the file is always whole.

    It is also `step<update>.ckpt`, the same file under another name, so that earlier ones can stay.
    """

    def __init__(
        self,
        directory: str,
        every_n_steps: int,
        *,
        keep_last: int = 2,
        keep_every_n_steps: int | None = None,
        on_disk_full: OnDiskFull = "continue",
    ) -> None:
        """Save into `directory`.

        Args:
            directory: Where the files are.
            every_n_steps: Updates between two of them, >= 1.
            keep_last: How many stay, >= 1; the one before the last is gone on from if the last one is damaged.
            keep_every_n_steps: Those after a multiple of so many updates stay for good; a multiple of `every_n_steps`.
            on_disk_full: Whether training goes on without a checkpoint that cannot be written, or stops.

        Raises: TypeError or ValueError for other numbers.
        """
        name = "callbacks.checkpoint"
        require_int(f"{name}.every_n_steps", every_n_steps, at_least=1)
        require_int(f"{name}.keep_last", keep_last, at_least=1)
        if keep_every_n_steps is not None:
            require_int(f"{name}.keep_every_n_steps", keep_every_n_steps, at_least=1)
            if keep_every_n_steps % every_n_steps:
                raise ValueError(
                    f"{name}.keep_every_n_steps must be a multiple of every_n_steps, {every_n_steps}, or nothing is "
                    f"saved then, got {keep_every_n_steps}"
                )
        if on_disk_full not in get_args(OnDiskFull):
            raise ValueError(f"{name}.on_disk_full must be continue or stop, got {on_disk_full!r}")
        self.path = Path(directory) / LAST
        self.every_n_steps = every_n_steps
        self.last_saved = 0  # update after which this start saved last
        self._failed_at = 0  # update after which the disk was full
        self._keep_last = keep_last
        self._keep_every = keep_every_n_steps
        self._stops_if_full = on_disk_full == "stop"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; where a validation is due, after that, or a run that goes on would leave it out."""
        if not is_validation_due(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it is time; `EMA`, which stands before, has put the trained weights back."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if self.is_due(trainer):
            self.save(trainer)

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether this update has a checkpoint."""
        step = trainer.global_step
        return step % self.every_n_steps == 0 or step == trainer.max_steps

    def save(self, trainer: pl.Trainer) -> None:
        """Save the state after this update, once; all devices must call this together.

        Raises: OSError on all devices if the disk is full and that is to stop the run.
        """
        if trainer.global_step in (self.last_saved, self._failed_at):
            return
        # What is not on the disk by then would be missing where the run goes on from here.
        if trainer.training:
            _log_update(trainer)
        for each in trainer.loggers:
            each.save()
        if failure := save_if_possible(trainer, self.path):
            self._failed_at = trainer.global_step
            self.tell_failure(failure)
            return
        self.last_saved = trainer.global_step
        if trainer.is_global_zero:
            self._keep(trainer.global_step)

    def tell_failure(self, failure: str) -> None:
        """A checkpoint could not be written. Raises: OSError if that is to stop the run."""
        if self._stops_if_full:
            raise full_disk_error(failure)
        rank_zero_only(logger.warning)(f"{failure}; training goes on, the next one is tried in its turn")

    def _keep(self, step: int) -> None:
        """Give what was saved its second name, and remove those that are to go."""
        kept = self.path.with_name(f"step{step:07d}.ckpt")
        with going_on_if_disk_is_full(kept):
            link(self.path, kept)
        # A directory has no second name: what is called by one stays.
        named = {path.resolve() for path in self.path.parent.iterdir() if path.is_symlink()}
        for old in earlier_checkpoints(self.path.parent)[self._keep_last :]:
            if old.resolve() not in named and (not self._keep_every or _step_of(old) % self._keep_every):
                # With what lies beside it, such as `powersgd/step0000500-rank0000.pt`.
                for path in (old, *old.parent.glob(f"*/{old.stem}-*")):
                    _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a directory, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _log_update(trainer: pl.Trainer) -> None:
    """Log this update now; Lightning would do so after its last callback, and then does not."""
    connector = trainer._logger_connector
    if "update_train_step_metrics" in vars(connector):  # it has been
        return
    connector.update_train_step_metrics()

    def not_again() -> None:
        del connector.update_train_step_metrics

    connector.update_train_step_metrics = not_again  # type: ignore[method-assign]


def link(path: Path, name: Path) -> None:
    """Give a checkpoint a second `name`, in place of what has it now, all at once."""
    if name.exists() and os.path.samefile(path, name):
        return  # to rename would leave the temporary name
    if name.is_dir() and not name.is_symlink():
        _remove(name)  # in parts, of the same update: nothing else is called so
    if path.is_dir():
        point_to(name, path.resolve())
        return
    with atomic(name) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # not every file system has links
            shutil.copyfile(path, temporary)


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning will validate right after this batch."""
    loops = trainer.fit_loop
    assert loops._data_fetcher is not None, "a batch has come from it"
    return loops.epoch_loop._should_check_val_fx(loops._data_fetcher)


def earlier_checkpoints(directory: Path) -> list[Path]:
    """All `step<update>.ckpt` in a directory, the newest first."""
    ours = (path for path in directory.glob("step*.ckpt") if path.stem.removeprefix("step").isdecimal())
    return sorted(ours, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step"))


def newest_whole(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its content, or None if there is none; damaged ones are named and left.

    Raises: DamagedCheckpointError if all are; ValueError if the newest whole one is not ours.
    """
    last = directory / LAST
    damaged: list[Path] = []
    first_error: DamagedCheckpointError | None = None
    for path in ([last] if last.exists() else []) + earlier_checkpoints(directory):
        try:
            check_sums(path)
            content = read_plain(path) if path.is_dir() else read_checkpoint(path, mapped=True)
        except DamagedCheckpointError as error:
            first_error = first_error or error
            damaged.append(path)
            continue
        if damaged:
            rank_zero_only(logger.warning)(f"'{damaged[0]}' is damaged; going on from '{path}'")
        return path, content
    if first_error is not None:
        if len(damaged) > 1:
            raise DamagedCheckpointError(
                f"all {len(damaged)} checkpoints in '{directory}' are damaged, of the newest: {first_error}"
            )
        raise first_error
    return None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it and renames it, so that a crash never damages the last one.

    Reads those in parts too, so that a run may go on without sharding.

    Attributes:
        failure: Why the last one is not there, in words, if the disk was full; what was there before still is. No
            error, because only the first device writes, and the others would wait for it.
    """

    def __init__(self) -> None:
        """Nothing has failed yet."""
        super().__init__()
        self.failure: str | None = None

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The content of a checkpoint, with whole tensors."""
        return read_sharded(path) if is_sharded(path) else super().load_checkpoint(path, *arguments, **options)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        self.failure = None
        try:
            with atomic(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:
            if not is_disk_full(error):
                raise
            self.failure = describe_full_disk(path, checkpoint)
