"""Weights & Biases, only when asked for: no account, no prompt and no network otherwise."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from pathlib import Path

from pytorch_lightning.loggers import WandbLogger

logger = logging.getLogger(__name__)


def close_wandb() -> None:
    """End the W&B run of this process, if there is one: the next job of a sweep must not log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def build_wandb_logger(*, project: str, name: str, directory: str) -> WandbLogger:
    """A logger for `logger=wandb`: online if there is an API key, else offline in `directory`.

    One run keeps its id through resumes. WANDB_MODE, if set, decides instead."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    offline = mode == "offline" if mode else not wandb.login(prompt=False)
    if offline:
        logger.info("logging to W&B offline in '%s'; 'wandb sync' uploads it later", directory)
    id_file = Path(directory) / "wandb_id"
    id_file.parent.mkdir(parents=True, exist_ok=True)
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    return WandbLogger(
        project=project,
        name=name,
        save_dir=directory,
        id=id_file.read_text(),
        resume=None if offline else "allow",
        offline=offline,
        log_model=False,
    )
