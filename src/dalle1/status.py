"""A table of all runs: `python -m dalle1.status runs/`; `--watch 10` shows it anew every ten seconds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from dalle1.cli import errors_in_one_line
from dalle1.run_status import STATUS, RunStatus, find_statuses, read_status

_HEADERS = (
    "run",
    "state",
    "update",
    "",
    "loss",
    "samples/s",
    "wait",
    "mfu",
    "left",
    "checkpoint",
    "best",
    "where",
    "said",
)


def table_of(directories: Sequence[str], *, now: float) -> str:
    """The runs below `directories`, a line each, and the errors of those that failed.

    Raises: ValueError if there is none, or for a file; FileNotFoundError for a directory that is not there.
    """
    rows, lines = [], []
    for directory in directories:
        if Path(directory).is_file():
            raise ValueError(f"a directory with runs is needed, '{directory}' is a file; name the one that it is in")
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"a directory with runs is needed, there is no '{directory}'; correct the path")
        for path in find_statuses(directory):
            try:
                status = read_status(path)
            except ValueError as error:
                lines.append(str(error))
                continue
            rows.append(_row(str(path.parent), status, now))
            if status.error is not None:
                lines.append(f"{path.parent}: {status.error}")
    if not rows and not lines:
        raise ValueError(
            f"there must be a run with a {STATUS} below {' or '.join(map(repr, directories))}, there is none; "
            "stage=dvae, clip and transformer write one"
        )
    return "\n".join([tabulate(rows, _HEADERS, disable_numparse=True), *lines])


def _row(run: str, status: RunStatus, now: float) -> tuple[str, ...]:
    state = status.seen(now)
    is_going = state in ("training", "validating")
    checkpoint = status.checkpoint_step, status.checkpoint_time
    return (
        run,
        state,
        f"{status.step:,} of {status.max_steps:,}",
        f"{status.step / status.max_steps:.0%}",
        "" if status.loss is None else f"{status.loss:.4g}",
        "" if status.samples_per_second is None else f"{status.samples_per_second:,.3g}",
        "" if status.data_wait is None else f"{status.data_wait:.1%}",
        "" if status.mfu is None else f"{status.mfu:.0%}",
        _span(status.seconds_left) if is_going and status.seconds_left is not None else "",
        "" if None in checkpoint else f"{checkpoint[0]:,}, {_span(now - (checkpoint[1] or now))} ago",
        "" if status.best_value is None else f"{status.best_value:.4g} at {status.best_step:,}",
        f"{status.host}, {status.pid}",
        f"{_span(now - status.updated)} ago",
    )


def _span(seconds: float) -> str:
    """A time in its two largest units."""
    minutes = int(max(0.0, seconds) // 60)
    if minutes < 1:
        return f"{max(0.0, seconds):.0f} s"
    hours, days = minutes // 60, minutes // 1440
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


@errors_in_one_line()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dalle1.status", description=__doc__)
    parser.add_argument("directories", nargs="*", default=["runs"], help="directories with runs (default: runs)")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show the table anew so often, until Ctrl-C")
    options = parser.parse_args()
    if options.watch is not None and not options.watch >= 1:
        raise ValueError(f"--watch must be >= 1 second, got {options.watch:g}")
    while True:
        print(table_of(options.directories, now=time.time()), flush=True)
        if options.watch is None:
            return
        time.sleep(options.watch)
        print()


if __name__ == "__main__":
    main()
