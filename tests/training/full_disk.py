"""A disk that is full while some checkpoints are written; `+callbacks.full._target_=full_disk.FullDisk` in a run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch


def save_on_full_disk(steps: Collection[int], save: Callable[..., None] = torch.save) -> Callable[..., None]:
    """`torch.save`, but for the checkpoints after `steps`: as torch does, it leaves half a file and raises."""

    def save_or_fail(content: Any, path: Path) -> None:
        if content["global_step"] not in steps:
            save(content, path)
            return
        path.write_bytes(b"half a file")
        # What torch 2.13 says on a full tmpfs.
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1600704 vs 1600656")

    return save_or_fail


class FullDisk(pl.Callback):
    """The disk is full for the checkpoint after update `step`, as far as this process and its first trainer know."""

    def __init__(self, step: int) -> None:
        """Be full then."""
        self._step = step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be full from here on."""
        torch.save = save_on_full_disk([self._step])  # type: ignore[assignment]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """There is room again."""
        self._step = -1
