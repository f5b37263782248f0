"""The table of runs: what each says of itself, and what has become of those that cannot say it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dalle1.run_status import SILENT_SECONDS, RunStatus, read_status, write_status
from dalle1.status import main, table_of

NOW = 1_000_000.0
STATUS = RunStatus(
    stage="dvae",
    state="training",
    step=1500,
    max_steps=6000,
    loss=-1.25,
    samples_per_second=58.9,
    data_wait=0.012,
    mfu=None,
    seconds_left=7500.0,
    checkpoint_step=1000,
    checkpoint_time=NOW - 90,
    best_value=-1.5,
    best_step=1200,
    host=socket.gethostname(),
    pid=os.getpid(),
    started=NOW - 3000,
    updated=NOW - 4,
    error=None,
)


def write(directory: Path, status: RunStatus) -> None:
    directory.mkdir(parents=True)
    write_status(directory, status)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a", STATUS)
    assert read_status(tmp_path / "a" / "status.json") == STATUS


def test_table_has_a_line_for_each_run(tmp_path: Path) -> None:
    write(tmp_path / "b" / "dvae", STATUS)
    write(tmp_path / "a", replace(STATUS, state="complete", step=6000, loss=None, checkpoint_step=None))
    write(tmp_path / "c", replace(STATUS, state="failed", error="ValueError: loss must be finite"))
    text = table_of([str(tmp_path)], now=NOW)
    lines = text.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [
        [str(tmp_path / "a"), "complete"],
        [str(tmp_path / "b" / "dvae"), "training"],
        [str(tmp_path / "c"), "failed"],
    ]
    for part in (
        "1,500 of 6,000",
        "25%",
        "-1.25",
        "58.9",
        "1.2%",
        "2 h 5 min",
        "1,000, 1 min ago",
        "-1.5 at 1,200",
        "4 s ago",
    ):
        assert part in lines[3], part
    assert "-1.5 at 1,200" in lines[3]
    assert lines[5] == f"{tmp_path / 'c'}: ValueError: loss must be finite"
    assert "100%" in lines[2]
    assert "min ago" not in lines[2], "no checkpoint is known"


def test_run_whose_process_is_gone_is_dead_and_one_of_another_machine_silent() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert STATUS.seen(NOW) == "training"
    assert replace(STATUS, pid=done.pid).seen(NOW) == "dead"
    assert replace(STATUS, pid=done.pid, state="complete").seen(NOW) == "complete"
    other = replace(STATUS, host="another", pid=done.pid)
    assert other.seen(NOW) == "training"
    assert other.seen(NOW + SILENT_SECONDS) == "silent"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"status\.json' must be a run's status\.json, it is not \("),
        ("[]", "it is not"),
        ("{}", "it is not"),
        (json.dumps(asdict(STATUS) | {"state": "asleep"}), "got the state 'asleep'"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_status(tmp_path / "status.json")
    assert "must be a run's status.json" in table_of([str(tmp_path)], now=NOW)


def test_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    no_run, no_directory, a_file = "there must be a run with a status.json below", "there is no '", "file' is a file;"
    for directory, message in (("", no_run), ("gone", no_directory), ("file", a_file)):
        monkeypatch.setattr(sys, "argv", ["status", str(tmp_path / directory)])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err


def test_command_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a", STATUS)
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path)])
    main()
    assert "1,500 of 6,000" in capsys.readouterr().out


def test_table_cannot_come_faster_than_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["status", "--watch", "-1"])
    with pytest.raises(SystemExit):
        main()
    assert "--watch must be >= 1 second, got -1" in capsys.readouterr().err
