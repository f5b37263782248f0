"""Requests wait in one line, and one at a time is worked on, in a thread of its own.

What a job tells is kept until it is taken, the latest of each kind: a reader that is slow or gone costs no memory.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

from dalle1.cli import describe

ENDS = ("done", "error", "stopped")  # the last thing that a job tells is one of these


class CancelledError(Exception):
    """Nobody waits for the job any more."""


class QueueFullError(ValueError):
    """No more requests can wait."""


class Job:
    """Work that waits for its turn, is done or is cancelled, and tells of itself."""

    def __init__(self, work: Callable[[Job], None], notify: Callable[[], None]) -> None:
        """`notify` is called, in any thread, whenever there is something to take."""
        self._work, self._notify = work, notify
        self._lock = threading.Lock()
        self._told: dict[str, dict[str, Any]] = {}
        self._cancelled = threading.Event()

    def tell(self, kind: str, data: dict[str, Any]) -> None:
        """Leave something to take; what was told of this kind before, and not taken, goes."""
        with self._lock:
            self._told.pop(kind, None)
            self._told[kind] = data
        self._notify()

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """All that was told since the last time, oldest first."""
        with self._lock:
            told, self._told = self._told, {}
        return list(told.items())

    def check(self) -> None:
        """Raise CancelledError if nobody waits for it any more; to be called between steps of the work."""
        if self._cancelled.is_set():
            raise CancelledError

    def cancel(self) -> None:
        """Let the next `check` end it."""
        self._cancelled.set()

    def run(self) -> None:
        """Do the work; whatever becomes of it, one of `ENDS` is told."""
        try:
            self.check()
            self.tell("started", {})
            self._work(self)
        except CancelledError:
            self.tell("stopped", {})
        except Exception as error:  # the next request must have its turn
            message = describe(error)
            if message is None:
                traceback.print_exc()
                message = f"this request has failed ({type(error).__name__}); the terminal of the page says why"
            self.tell("error", {"error": message})


class JobQueue:
    """Jobs in the order of their coming, worked on one at a time."""

    def __init__(self, most_waiting: int) -> None:
        """Start the thread; `most_waiting` jobs may wait besides the one that is worked on."""
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job], None], notify: Callable[[], None]) -> Job:
        """Join the line. The job tells `waiting` with its `place`: how many must be finished or leave before it.

        Raises: QueueFullError if too many wait already, and after `close`.
        """
        job = Job(work, notify)
        with self._changed:
            if self._closed:
                raise QueueFullError("the page's program is being ended; start it again")
            if len(self._waiting) + (self._running is not None) > self._most_waiting:
                raise QueueFullError(
                    f"the line must have a free place, all {self._most_waiting} are taken; try again later"
                )
            self._waiting.append(job)
            self._tell_places()
            self._changed.notify()
        return job

    def leave(self, job: Job) -> None:
        """Give up a job's place, or end it between two steps if it is worked on; may be called at any time."""
        job.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_places()

    def close(self) -> None:
        """End all jobs and, after the running one's present step, the thread."""
        with self._changed:
            self._closed = True
            ended = [*self._waiting, *([self._running] if self._running else [])]
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for job in ended:
            job.cancel()
        for job in waiting:
            job.tell("stopped", {})

    def join(self) -> None:
        """Wait for the end of the thread, after `close`."""
        self._thread.join()

    def _tell_places(self) -> None:
        before = 0 if self._running is None else 1
        for place, job in enumerate(self._waiting, before):
            job.tell("waiting", {"place": place})

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._running = self._waiting.pop(0)
                self._tell_places()
                job = self._running
            job.run()
