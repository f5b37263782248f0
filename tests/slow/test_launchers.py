"""Sweeps through Hydra's launchers: jobs side by side, one that fails, and the signals that schedulers send."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from launching import call
from test_train_script import TINY, TINY_DVAE

from dalle1.checkpoint import read_checkpoint
from dalle1.training.sweep_record import SweepRecord

pytestmark = pytest.mark.slow

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
SUBMITIT = ("hydra/launcher=submitit_local",)
SWEEP = ("-m", *TINY, "hydra.sweep.dir=sweep")
SIGNAL = "+callbacks.kill._target_=killing.SignalStarter"


@pytest.mark.parametrize("launcher", [JOBLIB, SUBMITIT], ids=["joblib", "submitit"])
def test_job_that_fails_is_recorded_and_the_other_one_finishes(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    done = call(tmp_path, *SWEEP, "stage=tokenizer", "text_vocab_size=300,1", *launcher)
    assert done.returncode == 1
    assert "all jobs of a sweep must end well, 1 of 2 have not: 1 in 'sweep'" in done.stderr.splitlines()[-1]
    jobs = SweepRecord(tmp_path / "sweep").jobs()
    assert [jobs[number].status for number in (0, 1)] == ["finished", "failed"]
    assert (jobs[1].error or "").startswith("text vocab_size must be >= 256, one entry per byte, got 1")
    assert json.loads((tmp_path / "sweep" / "0" / "summary.json").read_text())["stage"] == "tokenizer"
    # Nothing is trained again.
    done = call(tmp_path, *SWEEP, "stage=tokenizer", "text_vocab_size=300", *launcher)
    assert done.returncode == 0, done.stderr
    assert "job 0 is complete" in done.stdout


@pytest.mark.parametrize(
    ("launcher", "generations"),
    # The job's starter is the sweep's process, or a worker of joblib's, which that has started.
    [((), 1), (JOBLIB, 2)],
    ids=["none", "joblib"],
)
def test_signal_to_the_sweep_stops_its_jobs_and_the_same_command_goes_on(
    tmp_path: Path, launcher: tuple[str, ...], generations: int
) -> None:
    kill = [SIGNAL, "+callbacks.kill.step=3,9999", f"+callbacks.kill.generations={generations}"]
    options = [*SWEEP, *TINY_DVAE, "optim.max_steps=200", *kill, *launcher]
    done = call(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    record = SweepRecord(tmp_path / "sweep")
    assert record.jobs()[0].status == "stopped"
    assert 3 < read_checkpoint(tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt")["global_step"] < 200
    # Side by side it may have been done before.
    assert record.jobs()[1].status in (("stopped", "finished") if launcher else ("waiting",))
    done = call(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert "continuing 'sweep/0' from step" in done.stdout
    assert {job.status for job in record.jobs().values()} == {"finished"}


def test_job_that_submitit_takes_away_comes_again_and_goes_on(tmp_path: Path) -> None:
    # What SLURM sends before the time is over, to the process that submitit has started.
    kill = [SIGNAL, "+callbacks.kill.step=3", f"+callbacks.kill.number={int(signal.SIGUSR1)}"]
    done = call(tmp_path, *SWEEP, *TINY_DVAE, "optim.max_steps=60", "optim.lr=1e-3,2e-3", *kill, *SUBMITIT)
    assert done.returncode == 0, done.stderr
    assert {job.status for job in SweepRecord(tmp_path / "sweep").jobs().values()} == {"finished"}
    said = "".join(path.read_text() for path in (tmp_path / "sweep" / ".submitit").rglob("*_log.out"))
    for number in (0, 1):
        assert f"SIGUSR1 has stopped 'sweep/{number}' after update" in said
        assert f"continuing 'sweep/{number}' from step" in said


def test_search_side_by_side_makes_all_trials(tmp_path: Path) -> None:
    search = ["hydra/sweeper=dalle1_optuna", "optim.lr=tag(log,interval(1e-4,1e-2))", "hydra.sweeper.n_trials=3"]
    done = call(tmp_path, *SWEEP, *TINY_DVAE, *search, "hydra.sweeper.n_jobs=2", *JOBLIB)
    assert done.returncode == 0, done.stderr
    jobs = SweepRecord(tmp_path / "sweep").jobs()
    assert {job.status for job in jobs.values()} == {"finished"}
    values = [jobs[number].value or 0.0 for number in range(3)]
    best = (tmp_path / "sweep" / "best.yaml").read_text()
    assert f"trial: {values.index(min(values))}\n" in best
