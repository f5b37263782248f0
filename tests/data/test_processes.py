"""Several processes for one thing: the same results, and an end when something goes wrong."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from dalle1.data import processes
from dalle1.data.processes import map_parts

PARTS = [range(start, start + 3) for start in range(0, 12, 3)]


class _Work:
    """Sums numbers; ends its process at 7 if asked to, raises at 4 if asked to."""

    def __init__(self, *, dies: bool = False, fails: bool = False) -> None:
        self._dies = dies
        self._fails = fails

    def part(self, numbers: range) -> _Work:
        return self

    def __call__(self, numbers: Iterable[int]) -> int:
        listed = list(numbers)
        if self._dies and 7 in listed:
            os._exit(1)
        if self._fails and 4 in listed:
            raise ValueError("four")
        return sum(listed)


@pytest.mark.parametrize("n_processes", [0, 1, 2])
def test_results_come_in_order_from_any_number_of_processes(n_processes: int) -> None:
    assert list(map_parts(_Work(), PARTS, n_processes)) == [3, 12, 21, 30]


def test_one_part_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", lambda *_, **__: pytest.fail("started"))
    assert list(map_parts(_Work(), PARTS[:1], 2)) == [3]


def test_process_that_dies_is_told() -> None:
    with pytest.raises(ValueError, match=r"a process .* has ended, .*; free some, or use one process"):
        list(map_parts(_Work(dies=True), PARTS, 2))


def test_error_of_a_process_is_raised_here() -> None:
    with pytest.raises(ValueError, match="four"):
        list(map_parts(_Work(fails=True), PARTS, 2))


def test_work_that_is_left_ends_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[dict[str, Any]] = []
    shutdown = processes.ProcessPoolExecutor.shutdown

    def note(self: Any, **how: Any) -> None:
        stopped.append(how)
        shutdown(self, **how)

    monkeypatch.setattr(processes.ProcessPoolExecutor, "shutdown", note)
    results = map_parts(_Work(), PARTS, 2)
    assert next(results) == 3
    results.close()  # type: ignore[attr-defined]
    assert stopped == [{"cancel_futures": True}]


def test_ctrl_c_waits_until_all_processes_are_known() -> None:
    reached = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored

    def start() -> None:
        with processes._ctrl_c_waits():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            reached.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert reached
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
