"""What was found wrong: counted once while it can be told apart, and a reason to stop."""

from __future__ import annotations

import pytest

from dalle1.data import findings
from dalle1.data.findings import CUT_CAPTION, Findings, join_findings


def test_each_counts_once_however_often_it_is_met() -> None:
    found = Findings()
    for _ in range(3):
        found.add({"a": "broken", "b": CUT_CAPTION}, n_wanted=2)
    found.add({"c": "broken"})
    assert found.count() == {"broken": 2, CUT_CAPTION: 1}


def test_beyond_a_number_every_meeting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "MOST_NAMED", 2)
    found = Findings()
    for _ in range(2):
        found.add({"a": "broken", "b": "broken", "c": "small"})
    assert found.named == {"a": "broken", "b": "broken"}
    assert found.count() == {"broken": 2, "small": 2}


def test_state_is_of_plain_types_and_adds_up() -> None:
    found, other = Findings(), Findings()
    found.add({"a": "broken"})
    other.add({"b": "broken"})
    state = found.state_dict()
    assert state == {"named": {"a": "broken"}, "unnamed": {}}
    other.load_state_dict(state)
    assert other.count() == {"broken": 2}
    assert join_findings([found, other]) == {"broken": 2}


def test_what_cannot_be_told_apart_counts_once_after_several_devices_have_loaded_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(findings, "MOST_NAMED", 2)
    saved = Findings()
    saved.add(dict.fromkeys("abcde", "broken"))
    devices = [Findings() for _ in range(3)]
    for rank, device in enumerate(devices):
        device.load_state_dict(saved.state_dict(), with_unnamed=rank == 0)
    assert join_findings(devices) == {"broken": 5}


def test_too_large_a_share_of_bad_samples_stops() -> None:
    found = Findings(max_bad_fraction=0.1)
    found.add({"first": "broken"}, n_wanted=1)  # too few to judge
    for number in range(10):
        found.add({f"{number}": "broken", f"cut {number}": CUT_CAPTION}, n_wanted=99)
    assert found.count()["broken"] == 11
    with pytest.raises(
        ValueError, match=r"at most 0\.1 of the samples .* got 121 of 1,112 .*broken \(121\).*; mend the data or raise"
    ):
        found.add({f"more {number}": "broken" for number in range(110)})


def test_limits_of_one_and_zero() -> None:
    Findings(max_bad_fraction=1.0).add({str(number): "broken" for number in range(200)}, n_wanted=100)
    none = Findings(max_bad_fraction=0.0)
    none.add({}, n_wanted=200)
    with pytest.raises(ValueError, match="at most 0 of the samples"):
        none.add({"a": "broken"}, n_wanted=1)
