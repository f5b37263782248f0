"""A run's checkpoints: written whole or not at all, kept by number, and the newest whole one found again."""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from dalle1.atomic_files import atomic
from dalle1.checkpoint import DamagedCheckpointError, read_checkpoint
from dalle1.data.fields import require_int
from dalle1.sharded_files import find_damage, is_sharded, read_plain, read_sharded

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


class LastCheckpoint(pl.Callback):
    """Saves `last.ckpt` every so many updates and after the last one; the file is always whole.

    It is also `step<update>.ckpt`, the same file under another name, so that earlier ones can stay.
    """

    def __init__(
        self, directory: str, every_n_steps: int, *, keep_last: int = 2, keep_every_n_steps: int | None = None
    ) -> None:
        """Save into `directory`.

        Args:
            directory: Where the files are.
            every_n_steps: Updates between two of them, >= 1.
            keep_last: How many stay, >= 1; the one before the last is gone on from if the last one is damaged.
            keep_every_n_steps: Those after a multiple of so many updates stay for good; a multiple of `every_n_steps`.

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
        self.path = Path(directory) / LAST
        self.every_n_steps = every_n_steps
        self.last_saved = 0  # update after which this start saved last
        self._keep_last = keep_last
        self._keep_every = keep_every_n_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Save the state after this update, once; all devices must call this together."""
        if trainer.global_step != self.last_saved:
            self.last_saved = trainer.global_step
            trainer.save_checkpoint(self.path)
            if trainer.is_global_zero:
                self._keep(trainer.global_step)

    def _keep(self, step: int) -> None:
        """Give what was saved its second name, and remove those that are to go."""
        kept = self.path.with_name(f"step{step:07d}.ckpt")
        if not is_sharded(self.path):  # a directory has that name already
            _remove(kept)
            try:
                os.link(self.path, kept)
            except OSError:  # not every file system has links
                with atomic(kept) as temporary:
                    shutil.copyfile(self.path, temporary)
        # A directory has no second name: what is called by one stays.
        named = {path.resolve() for path in self.path.parent.iterdir() if path.is_symlink()}
        for old in earlier_checkpoints(self.path.parent)[self._keep_last :]:
            if old.resolve() not in named and (not self._keep_every or _step_of(old) % self._keep_every):
                _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a file, a directory, or nothing."""
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def _check_sums(path: Path) -> None:
    """Raise DamagedCheckpointError if a byte of a tensor has changed: torch writes sums of them, and does not look."""
    if path.is_dir():
        if damage := find_damage(path):
            raise DamagedCheckpointError(f"'{path}' is damaged: {damage}; delete it")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:  # what is wrong with other files, `read_checkpoint` says
        return
    if damaged is not None:
        raise DamagedCheckpointError(f"'{path}' is damaged: '{damaged}' in it has another checksum; delete it")


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
            _check_sums(path)
            content = read_plain(path) if path.is_dir() else read_checkpoint(path)
        except DamagedCheckpointError as error:
            first_error = first_error or error
            damaged.append(path)
            continue
        if damaged:
            rank_zero_only(logger.warning)(f"'{damaged[0]}' is damaged; going on from '{path}'")
        return path, content
    if first_error is not None:
        raise first_error
    return None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it and renames it, so that a crash never damages the last one.

    Reads those in parts too, so that a run may go on without sharding."""

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """The content of a checkpoint, with whole tensors."""
        return read_sharded(path) if is_sharded(path) else super().load_checkpoint(path, *arguments, **options)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)
