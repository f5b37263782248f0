"""A run that does not go on says for which device it waits, and ends."""

from __future__ import annotations

import threading

import pytest

from dalle1.training.hang_watch import HangWatch, Place, describe


def place(rank: int, count: int = 5, doing: str = "computes update 3", beats: int = 9) -> Place:
    return Place(rank=rank, host=f"node{rank}", beats=beats, count=count, doing=doing)


def test_rank_that_is_behind_the_others_is_named() -> None:
    slow = place(2, count=4, doing="waits for the data that follow update 2")
    assert describe([place(0), place(1), slow], []) == (
        "rank 0 computes update 3 and waits for rank 2 (on node2), which waits for the data that follow update 2"
    )


def test_rank_that_says_nothing_is_named_before_one_that_is_behind() -> None:
    dead = place(1)
    assert describe([place(0), dead, place(2, count=4)], [dead]) == (
        "the others wait for rank 1 (on node1), which says nothing any more; the last that it said is that it "
        "computes update 3"
    )


def test_ranks_at_the_same_place_are_told_from_one_that_is_late() -> None:
    assert describe([place(0), place(1)], []) == "all 2 ranks are at the same place, rank 0 computes update 3"
    assert describe([place(0)], []) == "the process computes update 3"


@pytest.mark.parametrize("minutes", [0.0, -1.0])
def test_timeout_must_be_some_time(minutes: float) -> None:
    with pytest.raises(ValueError, match=f"timeout_minutes must be > 0, got {minutes}"):
        HangWatch(minutes)


def test_process_that_does_not_go_on_says_where_it_is_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch, ended, last_words = HangWatch(0.002), threading.Event(), []

    def end(why: str) -> None:
        last_words.append(why)
        ended.set()

    monkeypatch.setattr(watch, "_end", end)
    watch._begin("computes update 3")
    watch._watch(0, 1, None, ended)
    assert capsys.readouterr().err.endswith("minutes: the process computes update 3\n")
    assert last_words[0].startswith("still nothing after 0.004")


def test_process_that_goes_on_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watch = HangWatch(0.002)

    class Ended(threading.Event):
        """After ten timeouts, in each of which something was begun."""

        beats = 0

        def wait(self, timeout: float | None = None) -> bool:
            watch._begin("computes an update") if self.beats % 5 == 0 else None
            self.beats += 1
            return self.beats > 80

    monkeypatch.setattr(watch, "_end", lambda why: pytest.fail(why))
    watch._watch(0, 1, None, Ended())
    assert capsys.readouterr().err == ""
