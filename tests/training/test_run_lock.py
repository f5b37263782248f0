"""A run is trained once at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment
from stage_runs import Train

from dalle1.training import run_lock
from dalle1.training.run_lock import locked

HOLD = """
import sys
from pathlib import Path
from dalle1.training.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_refused_until_the_first_is_gone(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 0.0)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "dvae")],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"once at a time, another process has '.*dvae'; stop that"):
            train(tmp_path, "dvae")
        other.kill()  # it cannot let go by itself
    with locked(tmp_path / "dvae"):
        pass
    assert list((tmp_path / "dvae").iterdir()) == []
