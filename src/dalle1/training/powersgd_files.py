"""What PowerSGD keeps from update to update, beside the checkpoints: `powersgd/step<update>-rank<rank>.pt`.

Each device writes its own, because what it could not send is its own and as large as the gradient. They are written
before the checkpoint of their update gets its name, and go when it goes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle1.atomic_files import atomic
from dalle1.checkpoint import check_sums

logger = logging.getLogger(__name__)
_DIRECTORY = "powersgd"


def state_path(checkpoints: Path, step: int, rank: int) -> Path:
    """Where the device `rank` keeps its state after update `step`."""
    return checkpoints / _DIRECTORY / f"step{step:07d}-rank{rank:04d}.pt"


def save_state(
    checkpoints: Path,
    *,
    step: int,
    rank: int,
    world_size: int,
    errors: Mapping[str, Tensor],
    queries: Mapping[str, Any],
) -> None:
    """Write the state of one of `world_size` devices; the file is whole or absent.

    Raises: OSError, or the RuntimeError that torch makes of a full disk.
    """
    content = {"step": step, "rank": rank, "world_size": world_size, "errors": dict(errors), "queries": dict(queries)}
    with atomic(state_path(checkpoints, step, rank)) as temporary:
        torch.save(content, temporary)


def load_state(
    checkpoints: Path, *, step: int, rank: int, world_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Error buffers and Qs with which the device `rank` of `world_size` goes on after update `step`.

    If the state is that of as many devices, this device's own. If it is of others, each gets the mean of their buffers:
    the gradient is a mean over devices, so what has not been sent yet weighs as much in it as before. None, and a line
    that says so, if files are missing or damaged.
    """
    try:
        own = _read(checkpoints, step, rank) if state_path(checkpoints, step, rank).exists() else None
        first = own or _read(checkpoints, step, 0)
        count = int(first["world_size"])
        if own is not None and count == world_size:
            return own["errors"], own["queries"]
        if own is None and count == world_size:
            raise FileNotFoundError(f"no '{state_path(checkpoints, step, rank)}'")
        # Their sum, one file after another: all of them may be more than the memory holds.
        errors = {name: error / count for name, error in _read(checkpoints, step, 0)["errors"].items()}
        for other in range(1, count):
            content = _read(checkpoints, step, other)
            if content["world_size"] != count:
                raise ValueError(f"'{state_path(checkpoints, step, other)}' is of {content['world_size']} devices")
            for name, error in content["errors"].items():
                errors[name] += error / count
    # A damaged pickle can raise any error.
    except Exception as error:
        reason = str(error).split("\n")[0]
        logger.warning(
            "what PowerSGD had not sent after update %d is lost, training goes on without it: %s", step, reason
        )
        return None
    if rank == 0:
        logger.info("of what PowerSGD had not sent on %d devices, each of %d gets the mean", count, world_size)
    return errors, first["queries"]


def remove_orphans(checkpoints: Path, step: int) -> None:
    """Remove states, but those of `step`, that have no checkpoint: a start that was killed may leave some."""
    for path in (checkpoints / _DIRECTORY).glob("step*-rank*.pt"):
        update = path.name.partition("-")[0]
        if update != f"step{step:07d}" and not (checkpoints / f"{update}.ckpt").exists():
            path.unlink(missing_ok=True)


def _read(checkpoints: Path, step: int, rank: int) -> dict[str, Any]:
    path = state_path(checkpoints, step, rank)
    if not path.exists():
        raise FileNotFoundError(f"no '{path}'")
    check_sums(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if (content["step"], content["rank"]) != (step, rank):
        raise ValueError(f"'{path}' is of update {content['step']} and device {content['rank']}")
    return content
