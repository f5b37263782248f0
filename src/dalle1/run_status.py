"""What a run says of itself while it trains: `status.json` in its directory."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dalle1.atomic_files import write_json

STATUS = "status.json"
# A run that trains says so every so many seconds, and is not heard of for as long as a large checkpoint takes.
EVERY_SECONDS, SILENT_SECONDS = 10, 1800

State = Literal["training", "validating", "stopped", "complete", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where a run is. Times are seconds since 1970."""

    stage: str
    state: State
    step: int  # updates that are done
    max_steps: int
    loss: float | None  # of the last update that was logged
    samples_per_second: float | None  # over all devices, without validation and checkpoints
    data_wait: float | None  # share of that time in which the first device waits for data
    mfu: float | None  # share of the machine that is used, of stages that know it
    seconds_left: float | None  # at the mean pace of this start, validation and checkpoints included
    checkpoint_step: int | None  # of the last one that this start has written
    checkpoint_time: float | None
    best_value: float | None = None  # of the metric by which `best.ckpt` is chosen
    best_step: int | None = None
    host: str
    pid: int  # of the first device's process
    started: float  # this start
    updated: float
    error: str | None  # in a sentence, of a failed run

    def seen(self, now: float) -> str:
        """The state, or what has become of it: a run that was killed cannot say so itself."""
        if self.state not in ("training", "validating"):
            return self.state
        if self.host == socket.gethostname() and not _is_alive(self.pid):
            return "dead"
        return "silent" if now - self.updated > SILENT_SECONDS else self.state


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_status(directory: str | Path, status: RunStatus) -> None:
    """Write `status.json` into a run's directory."""
    write_json(Path(directory, STATUS), asdict(status))


def read_status(path: Path) -> RunStatus:
    """What a `status.json` says. Raises: ValueError if it is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        status = RunStatus(**{field.name: content[field.name] for field in fields(RunStatus) if field.name in content})
        time.localtime(status.updated)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"'{path}' must be a run's {STATUS}, it is not ({error!r})") from error
    if status.state not in get_args(State):
        raise ValueError(f"'{path}' must be a run's {STATUS}, got the state {status.state!r}")
    return status


def find_statuses(root: str | Path) -> Iterator[Path]:
    """All `status.json` below a directory, sorted."""
    yield from sorted(Path(root).rglob(STATUS))
