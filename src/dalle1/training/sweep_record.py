"""What a sweep knows of its jobs, `sweep.json` in its directory, and the request that they stop.

Jobs may be in other processes, and on other machines that share the directory; each writes down its own state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from dalle1.atomic_files import write_json

SWEEP = "sweep.json"
_LOCK, _STOP, _AT_WORK = f".{SWEEP}.lock", ".stop", ".at-work.lock"

Status = Literal["waiting", "running", "stopped", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep, in the directory of its number."""

    overrides: list[str] = field(default_factory=list)  # all that it was given on the command line
    status: Status = "waiting"
    error: str | None = None  # of a failed job, in one line
    metric: str | None = None  # the one that jobs are compared by
    value: float | None = None  # what it was at the end
    interruptions: int = 0  # how often the sweep ended without a word from the job


class SweepRecord:
    """The record of a sweep in `directory`, which is made if it is missing."""

    def __init__(self, directory: str | Path) -> None:
        """Nothing is read or written yet."""
        self.directory = Path(directory)

    def jobs(self) -> dict[int, Job]:
        """All jobs by number. Raises: ValueError if there is a `sweep.json` that is none."""
        path = self.directory / SWEEP
        if not path.exists():
            return {}
        names = {each.name for each in fields(Job)}
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            jobs = {
                int(number): Job(**{name: job[name] for name in names & job.keys()})
                for number, job in content["jobs"].items()
            }
            wrong = next((job for job in jobs.values() if job.status not in get_args(Status)), None)
            if wrong is not None:
                raise ValueError(f"the status {wrong.status!r}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"'{path}' must be what a sweep has written, it is not ({error!r}); choose another hydra.sweep.dir="
            ) from error
        return jobs

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While one command works on the sweep, no other one does.

        Raises: ValueError if another one holds it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        held = FileLock(self.directory / _AT_WORK, timeout=0)
        try:
            held.acquire()
        except Timeout as error:
            raise ValueError(
                f"one command at a time must work on a sweep, another one does in '{self.directory}'; "
                "wait for its end, or choose another hydra.sweep.dir="
            ) from error
        try:
            yield
        finally:
            held.release()

    def begin(self) -> dict[int, Job]:
        """All jobs, where nobody works on them: those that run were left without a word.

        Raises: as `jobs`."""
        (self.directory / _STOP).unlink(missing_ok=True)
        with self._lock():
            jobs = {
                number: job
                if job.status != "running"
                else replace(job, status="stopped", interruptions=job.interruptions + 1)
                for number, job in self.jobs().items()
            }
            self._write(jobs)
        return jobs

    def await_jobs(self, overrides: Mapping[int, Sequence[str]]) -> None:
        """Note jobs that are about to be launched, by their numbers."""
        with self._lock():
            jobs = self.jobs()
            for number, options in overrides.items():
                jobs[number] = replace(jobs.get(number, Job()), overrides=list(options), status="waiting", error=None)
            self._write(jobs)

    def note(self, number: int, status: Status, **changes: Any) -> None:
        """Note what has become of a job; `changes` are other fields of its `Job`."""
        with self._lock():
            jobs = self.jobs()
            jobs[number] = replace(jobs.get(number, Job()), status=status, **changes)
            self._write(jobs)

    def ask_to_stop(self) -> None:
        """Ask all jobs to save their state and to end, and those that have not begun not to begin."""
        (self.directory / _STOP).touch()

    def is_asked_to_stop(self) -> bool:
        """Whether somebody has, since the sweep began."""
        return (self.directory / _STOP).exists()

    def _lock(self) -> FileLock:
        self.directory.mkdir(parents=True, exist_ok=True)
        return FileLock(self.directory / _LOCK)

    def _write(self, jobs: Mapping[int, Job]) -> None:
        write_json(self.directory / SWEEP, {"jobs": {str(number): asdict(jobs[number]) for number in sorted(jobs)}})


def metric_of(summary: Mapping[str, Any], name: str | None) -> float | None:
    """The number that a run's summary has for a metric, called as in its curves or as in the summary; else None."""
    value = summary.get(name.removeprefix("val/")) if name else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]
