"""A full disk costs what could not be written, and not the run."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
# How torch 2.13 says it, on a full tmpfs: "[enforce fail at inline_container.cc:672] . unexpected pos 1600704 vs
# 1600656"; the other words of its writer begin with the second name.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
_said: set[Path] = set()  # what a line has told of in this process


def is_disk_full(error: BaseException) -> bool:
    """Whether a write has failed because there was no space, or nothing left of a quota."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER)


@contextmanager
def going_on_if_disk_is_full(path: str | Path) -> Iterator[None]:
    """A line says, once, that `path` could not be written; other errors stay errors."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        if Path(path) not in _said:
            _said.add(Path(path))
            logger.warning("'%s' could not be written: the disk is full; going on without (said once)", path)


def describe_full_disk(path: str | Path, content: dict[str, Any]) -> str:
    """Which checkpoint could not be written, the size that it needs and what there is."""
    free = shutil.disk_usage(Path(path).parent).free
    return (
        f"'{path}' could not be written: the disk is full, about {_bytes_of(content) / 1e9:.3g} GB are needed and "
        f"{free / 1e9:.3g} GB free"
    )


def _bytes_of(content: Any) -> int:
    """Of all tensors in it; what else there is takes next to nothing."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(_bytes_of, content.values()))
    return sum(map(_bytes_of, content)) if isinstance(content, list | tuple) else 0


def save_if_possible(trainer: pl.Trainer, path: Path) -> str | None:
    """Save a checkpoint; if the disk is full, why it is not there. All devices call it together and hear the same."""
    trainer.save_checkpoint(path)
    return trainer.strategy.broadcast(getattr(trainer.strategy.checkpoint_io, "failure", None))


def save_or_fail(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint. Raises: OSError, on all devices, if the disk is full."""
    if failure := save_if_possible(trainer, path):
        raise full_disk_error(failure)


def full_disk_error(failure: str) -> OSError:
    """The error of a run that a full disk ends."""
    return OSError(f"{failure}; make room, then the same command goes on from the checkpoint before")


class PatientCSVLogger(CSVLogger):
    """Keeps the rows that a full disk does not take, and writes them when it does again."""

    @rank_zero_only
    def save(self) -> None:
        """Write what there is, whole rows or none."""
        path = Path(self.experiment.metrics_file_path)
        size = path.stat().st_size if path.exists() else None
        with going_on_if_disk_is_full(path):
            try:
                super().save()
            except OSError:
                if size is None:
                    path.unlink(missing_ok=True)
                elif path.stat().st_size > size:
                    os.truncate(path, size)
                raise
