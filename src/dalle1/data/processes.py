"""Work on many samples in several processes, which ends at once and wholly when it is interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import Protocol, TypeVar

T = TypeVar("T", covariant=True)

_AHEAD = 4  # parts for each process that wait for their turn or are done early


def n_usable_cores() -> int:
    """Cores that this process may run on, which a scheduler may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Work(Protocol[T]):
    """Something to do with samples by their numbers; its parts can be pickled."""

    def __call__(self, numbers: Iterable[int]) -> T:
        """Do it."""

    def part(self, numbers: range) -> Work[T]:
        """The same for these numbers alone, which takes no more memory than they need."""


def map_parts(work: Work[T], parts: Sequence[range], n_processes: int) -> Iterator[T]:
    """What `work` gives for the numbers of each part, in order; in this process for less than two processes or parts.

    Raises: ValueError if a process ends before its work.
    """
    if n_processes < 2 or len(parts) < 2:
        yield from map(work, parts)
        return
    # Not fork: the caller may have started threads, whose locks a forked child could inherit taken.
    context = get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(n_processes, context, initializer=_start, initargs=(stop,))
    try:
        waiting: deque[Future[T]] = deque()
        for part in parts:
            with _ctrl_c_waits():  # each call may start a process
                waiting.append(pool.submit(_work_on, work.part(part), part))
            if len(waiting) >= _AHEAD * n_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that looks at samples has ended, perhaps for want of memory; free some, or use one process"
        ) from error
    finally:
        # Not the pool as a context: at its end it waits for all that was asked for.
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Start processes that never hear of Ctrl-C, which all would: the first one ends the others.

    Raises: KeyboardInterrupt at the end, if there was one: in the middle it could leave a process that nobody ends.
    """
    heard: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    hears = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    if hears:
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # what has come is heard here
        if hears:
            signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


_stop: list[Event] = []  # of a process that works on parts


def _start(stop: Event) -> None:
    _stop[:] = [stop]


def _work_on(work: Work[T], numbers: range) -> T:
    return work(number for number in numbers if not _stop[0].is_set())
