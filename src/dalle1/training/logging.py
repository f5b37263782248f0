"""Weights & Biases, only when asked for: no account, no prompt and no network otherwise; and what loggers share."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_lightning.loggers import Logger, WandbLogger

from dalle1.atomic_files import atomic
from dalle1.training.bad_updates import ReturnToCheckpointError
from dalle1.training.disk_full import going_on_if_disk_is_full
from dalle1.training.stop_signals import RunStoppedError
from dalle1.training.tensorboard import TensorBoard

logger = logging.getLogger(__name__)
_ID_FILE = "wandb_id"  # in the run's directory
# Where W&B keeps the pictures of tables until they are uploaded: by default in the home directory, apart from the run.
_DATA_DIR = "WANDB_DATA_DIR"
# What a stage that trains a network is judged by first, of all in its summary.
_RESULTS = {
    "dvae": ("psnr_db", "codes_used_share"),
    "clip": ("caption_accuracy",),
    "transformer": ("image_nats_per_token", "text_nats_per_token"),
}


@contextmanager
def wandb_run_ends() -> Iterator[None]:
    """A W&B run that begins inside ends with it, as failed after an error; what comes after it has its own."""
    before, failed = _current_run(), True
    data = os.environ.get(_DATA_DIR)
    try:
        yield
        failed = False
    except (RunStoppedError, ReturnToCheckpointError):  # it goes on later
        failed = False
        raise
    finally:
        run = _current_run()
        if run is not None and run is not before:
            run.finish(exit_code=int(failed))
        if data is None:
            os.environ.pop(_DATA_DIR, None)


def _current_run() -> Any:
    wandb = sys.modules.get("wandb")
    return wandb.run if wandb is not None else None


def build_wandb_logger(*, project: str, name: str, group: str | None, job_type: str, directory: str) -> WandbLogger:
    """A logger for `logger=wandb`: online if there is an API key, else offline in `directory`.

    One run keeps its id through resumes. WANDB_MODE, if set, decides instead. Runs of one `group` are shown together.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    offline = mode == "offline" if mode else not wandb.login(prompt=False)
    if offline:
        logger.info("logging to W&B offline in '%s'; 'wandb sync' uploads it later", directory)
    id_file = Path(directory) / _ID_FILE
    return WandbLogger(
        project=project,
        name=name,
        group=group,
        job_type=job_type,
        save_dir=directory,
        id=id_file.read_text() if id_file.exists() else secrets.token_hex(4),
        resume=None if offline else "allow",
        offline=offline,
        log_model=False,
        # Lightning says `offline` by WANDB_MODE alone, which W&B no longer reads once it was asked for a key.
        mode="offline" if offline else mode,
    )


def begin_wandb_run(wandb_logger: WandbLogger, directory: Path, options: Mapping[str, Any]) -> None:
    """Log the run's options, and keep its id in `directory` for when it is resumed."""
    os.environ.setdefault(_DATA_DIR, str((directory / "wandb").absolute()))
    wandb_logger.log_hyperparams(dict(options))
    assert wandb_logger.version is not None, "build_wandb_logger gave it an id"
    with atomic(directory / _ID_FILE) as temporary:
        temporary.write_text(wandb_logger.version, encoding="utf-8")


def finish_wandb_run(summary: Mapping[str, Any]) -> None:
    """Put what a run has come to beside its curves, as `final/<name>`; nothing without W&B."""
    run = _current_run()
    if run is not None:
        run.summary.update({f"final/{name}": value for name, value in summary.items()})


def say_result(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """A line with what a network's training has come to, how long it took and where it is."""
    names = [name for name in _RESULTS.get(summary["stage"], ()) if name in summary]
    if names:
        numbers = ", ".join(f"{name} {summary[name]:.4g}" for name in names)
        took = timedelta(seconds=round(summary["wall_seconds"]))
        logger.info("'%s' is complete after %s: %s", os.path.relpath(run_dir), took, numbers)


def log_samples(
    loggers: Iterable[Logger],
    name: str,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    update: int,
    step: int,
) -> None:
    """Give W&B a table with a row for each prompt: the update, the prompt, its picture. `step` as in `log_picture`.

    Every validation has a table of its own, whose size stays the same; W&B shows those of all steps together.
    """
    for each in loggers:
        if isinstance(each, WandbLogger):
            import wandb

            rows = [[update, prompt, wandb.Image(picture)] for prompt, picture in zip(prompts, pictures, strict=True)]
            with going_on_if_disk_is_full(each.save_dir or ""):
                each.log_metrics({name: wandb.Table(columns=["step", "prompt", "picture"], data=rows)}, step)  # type: ignore[dict-item]


def log_picture(loggers: Iterable[Logger], name: str, picture: Image.Image, step: int) -> None:
    """Give a picture to the loggers that take some. `step` is the number that curves have there."""
    for each in loggers:
        if isinstance(each, TensorBoard):
            each.log_picture(name, picture, step)
        elif isinstance(each, WandbLogger):
            with going_on_if_disk_is_full(each.save_dir or ""):
                each.log_image(name, [picture], step)
