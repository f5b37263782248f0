"""One run, one process that writes it: a job that comes again may find the one before still alive."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Loader workers of a process that was killed hold its lock until they notice, which takes them some seconds.
_PATIENCE_SECONDS, _POLL_SECONDS = 30.0, 0.5


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold a run's directory, in its first process; the system lets go of it however the process ends.

    The lock is on the directory itself, so nothing is left behind. File systems without locks have none.

    Raises: ValueError if another process holds it for half a minute.
    """
    if fcntl is None or getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(
                        f"a run must be trained once at a time, another process has '{os.path.relpath(run_dir)}'; "
                        "stop that (python -m dalle1.status shows where it is), or choose another name="
                    ) from None
                time.sleep(_POLL_SECONDS)
                continue
            except OSError:  # no locks here
                pass
            break
        yield
    finally:
        os.close(handle)
