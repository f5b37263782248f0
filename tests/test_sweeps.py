"""Sweeps of train.py: what is recorded, what a second start does, what Optuna is told. Jobs here only write numbers."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig
from optuna.trial import TrialState

from dalle1.cli import run_script
from dalle1.training.sweep_job import SweepJob
from dalle1.training.sweep_record import Job, SweepRecord, metric_of
from hydra_plugins.dalle1_sweepers.optuna_search import OptunaSweeper

Sweep = Callable[..., dict[int, Job]]  # the fixture `sweep`

CONFIG = """
defaults:
  - override hydra/sweeper: dalle1_grid
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
  - _self_
lr: 1.0
width: 1
mode: train
stage: {name: dvae, monitor: val/loss}
run_dir: ${hydra:runtime.output_dir}
hydra: {output_subdir: null, sweep: {dir: sweep, subdir: "${hydra:job.num}"}, run: {dir: unused}}
"""


class Jobs:
    """Stands for training: the loss is (lr - 3)^2 + width. `before` is called with each job's options."""

    def __init__(self) -> None:
        self.made: list[tuple[float, int]] = []
        self.before: Callable[[DictConfig], bool | None] = lambda cfg: None

    def __call__(self, cfg: DictConfig) -> dict[str, Any]:
        def work() -> dict[str, Any] | None:
            if self.before(cfg) is False:
                return None  # a signal has stopped it
            self.made.append((cfg.lr, cfg.width))
            summary = {"stage": "dvae", "loss": (cfg.lr - 3) ** 2 + cfg.width, "step": 2}
            Path(cfg.run_dir, "summary.json").write_text(json.dumps(summary))
            return summary

        return SweepJob(cfg, HydraConfig.get()).run(work)


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Jobs) -> Sweep:
    """Runs `-m` with options; checks the exit code; returns what sweep.json has."""
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "app.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)

    def task(cfg: DictConfig) -> dict[str, Any]:
        return jobs(cfg)

    def run(*options: str, code: int = 0) -> dict[int, Job]:
        monkeypatch.setattr(sys, "argv", ["app.py", "-m", *options])
        left = 0
        try:
            run_script(task, config_dir=conf, config_name="app")
        except SystemExit as stop:
            left = int(stop.code or 0)
        assert left == code
        return SweepRecord(tmp_path / "sweep").jobs()

    return run


def fail_at(lr: float) -> Callable[[DictConfig], None]:
    def before(cfg: DictConfig) -> None:
        if cfg.lr == lr:
            raise ValueError(f"lr must be another one, got {cfg.lr}")

    return before


@pytest.mark.parametrize(("name", "status"), [("TERM", "stopped"), ("USR1", "stopped"), ("KILL", "failed")])
def test_signal_before_a_job_has_begun_to_train_stops_it(
    sweep: Sweep, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: str
) -> None:
    """As one that is still importing, and has nothing to save; SIGKILL is also how a lack of memory ends it."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nkill -{name} $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def in_new_process(cfg: DictConfig) -> bool:
        return SweepJob(cfg, HydraConfig.get()).in_new_process(tmp_path / "job.yaml", {}) is not None

    jobs.before = in_new_process
    assert sweep("lr=1", code=int(status == "failed"))[0].status == status


def test_failed_job_is_recorded_while_others_go_on_and_is_tried_again(
    sweep: Sweep, jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.before = fail_at(2.0)
    record = sweep("lr=1,2,3", code=1)
    assert [record[number].status for number in (0, 1, 2)] == ["finished", "failed", "finished"]
    assert record[0] == Job(overrides=["lr=1"], status="finished", metric="val/loss", value=5.0)
    assert record[1].error == "lr must be another one, got 2"
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: all jobs of a sweep must end well, 1 of 3 have not: 1 in 'sweep', whose sweep.json says why; "
        "the same command with hydra.sweep.dir=sweep tries them again"
    )
    jobs.before = lambda cfg: None
    record = sweep("lr=1,2,3")
    assert jobs.made == [(1, 1), (3, 1), (2, 1)]
    assert (record[1].status, record[1].error, record[1].value) == ("finished", None, 2.0)


def test_larger_grid_in_the_same_directory_makes_what_is_missing(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    sweep("lr=1,2", "width=1")
    record = sweep("lr=0,1,2", "width=1,2")
    assert jobs.made == [(1, 1), (2, 1), (0, 1), (0, 2), (1, 2), (2, 2)]
    # Numbers stay, or a run would find another one's checkpoint.
    assert [record[number].overrides for number in (0, 1)] == [["lr=1", "width=1"], ["lr=2", "width=1"]]
    (tmp_path / "sweep" / "0" / "summary.json").unlink()
    sweep("lr=1,2", "width=1")
    assert jobs.made[6:] == [(1, 1)]


def test_order_of_options_makes_no_other_job(sweep: Sweep, jobs: Jobs) -> None:
    sweep("lr=1,2", "width=3")
    record = sweep("width=3", "lr=2,1")
    assert (len(record), jobs.made) == (2, [(1, 3), (2, 3)])


@pytest.mark.parametrize("sweeper", ["dalle1_grid", "dalle1_optuna"])
def test_option_can_be_left_out_of_all_jobs(sweep: Sweep, jobs: Jobs, sweeper: str) -> None:
    jobs.before = lambda cfg: "mode" not in cfg
    record = sweep(f"hydra/sweeper={sweeper}", "~mode", "lr=1,2", *["hydra.sweeper.n_trials=2"] * ("optuna" in sweeper))
    assert [record[number].status for number in (0, 1)] == ["finished"] * 2


def test_grid_of_an_interval_is_refused(sweep: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    sweep("lr=interval(0,1)", code=2)
    assert "lr must have single values, got an interval" in capfd.readouterr().err


def test_signal_stops_the_job_and_the_sweep_and_the_same_command_goes_on(sweep: Sweep, jobs: Jobs) -> None:
    def before(cfg: DictConfig) -> bool | None:
        if cfg.lr == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            return False
        return None

    jobs.before = before
    record = sweep("lr=1,2,3")
    assert [record[number].status for number in (0, 1, 2)] == ["finished", "stopped", "waiting"]
    jobs.before = lambda cfg: None
    record = sweep("lr=1,2,3")
    assert jobs.made == [(1, 1), (2, 1), (3, 1)]
    assert {job.status for job in record.values()} == {"finished"}


def test_job_that_was_stopped_alone_does_not_end_the_sweep(sweep: Sweep, jobs: Jobs) -> None:
    jobs.before = lambda cfg: False if cfg.lr == 1 else None
    record = sweep("lr=1,2")
    assert [record[number].status for number in (0, 1)] == ["stopped", "finished"]


@pytest.mark.parametrize("message", ["first line\nthe queue must be open", ""])
def test_launcher_that_gives_up_is_told(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], message: str
) -> None:
    def launch(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: SimpleNamespace(launch=launch))
    record = sweep("lr=1,2", code=1)
    said = "the queue must be open" if message else "RuntimeError('')"
    assert f"the launcher must see all jobs end, it has given up ({said})" in capfd.readouterr().err
    assert {job.status for job in record.values()} == {"waiting"}


def test_sweep_shows_the_metric_that_it_was_asked_for(sweep: Sweep) -> None:
    assert sweep("lr=1", "hydra.sweeper.metric=step")[0].value == 2.0


@pytest.mark.parametrize(
    ("summary", "name", "value"),
    [
        *[({"loss": 2}, "val/loss", 2.0), ({"loss": 2}, "loss", 2.0), ({"loss": 1}, "psnr", None), ({}, None, None)],
        *[({"loss": "x"}, "loss", None), ({"alarm": True}, "alarm", None), ({"loss": float("nan")}, "loss", None)],
    ],
)
def test_metric_is_a_number_of_the_summary(summary: dict[str, Any], name: str | None, value: float | None) -> None:
    assert metric_of(summary, name) == value


@pytest.mark.parametrize("content", ["{", '{"jobs": {"a": {}}}', '{"jobs": {"0": {"status": "odd"}}}', "[]"])
def test_file_that_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep.json' must be what a sweep has written"):
        SweepRecord(tmp_path).begin()


def test_directories_of_jobs_cannot_be_named(sweep: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    sweep("lr=1", "hydra.sweep.subdir=a", code=2)
    assert "hydra.sweep.subdir must stay as it is, since jobs have numbers, got a" in capfd.readouterr().err


SEARCH = ("hydra/sweeper=dalle1_optuna", "lr=interval(0.0,10.0)", "width=choice(1,5)")


def study(tmp_path: Path) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "sweep" / "study.journal"))
    return optuna.load_study(study_name="dalle1", storage=optuna.storages.journal.JournalStorage(backend))


# 12: the first ten of TPE are random.
@pytest.mark.parametrize(("sampler", "n_trials"), [("tpe", 12), ("random", 4)])
def test_search_that_was_interrupted_makes_the_trials_that_it_would_have(
    sweep: Sweep, jobs: Jobs, tmp_path: Path, sampler: str, n_trials: int
) -> None:
    options = (
        *SEARCH,
        f"hydra.sweeper.n_trials={n_trials}",
        f"hydra.sweeper.sampler={sampler}",
        "hydra.sweeper.seed=7",
    )
    sweep(*options, "hydra.sweep.dir=whole")
    whole, jobs.made = jobs.made, []

    def before(cfg: DictConfig) -> None:
        if len(jobs.made) == n_trials - 2:
            raise KeyboardInterrupt

    jobs.before = before
    record = sweep(*options, code=130)
    assert (len(record), record[n_trials - 2].status) == (n_trials - 1, "stopped")
    jobs.before = lambda cfg: None
    record = sweep(*options)
    assert jobs.made == whole
    assert len(set(whole)) == n_trials
    assert len(record) == len(study(tmp_path).trials) == n_trials
    sweep(*options)
    assert jobs.made == whole, "nothing is missing"
    if sampler == "random":
        sweep(*options, "hydra.sweeper.n_trials=5")
        assert len(jobs.made) == 5


@pytest.mark.parametrize("options", [["lr=1,2", "hydra.sweep.dir=sweep"], SEARCH])
def test_one_command_at_a_time_works_on_a_sweep(
    sweep: Sweep, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with SweepRecord(tmp_path / "sweep").hold():
        sweep(*options, code=1)
    assert "another one does in 'sweep'" in capsys.readouterr().err
    assert jobs.made == []
    sweep(*options)
    assert jobs.made


def test_best_trial_is_written_down(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    sweep("mode=eval", *SEARCH, "hydra.sweeper.n_trials=4")
    losses = [(lr - 3) ** 2 + width for lr, width in jobs.made]
    number = losses.index(min(losses))
    lr, width = jobs.made[number]
    assert yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text()) == {
        "trial": number,
        "metric": "val/loss",
        "value": min(losses),
        "options": {"lr": lr, "width": str(width)},
        "command": f"python train.py mode=eval lr={lr} width={width}",
    }


def test_search_whose_record_is_lost_says_so_before_anything_runs(
    sweep: Sweep, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(*SEARCH, "hydra.sweeper.n_trials=2")
    (tmp_path / "sweep" / "sweep.json").unlink()
    sweep(*SEARCH, "hydra.sweeper.n_trials=3", code=1)
    assert "the sweep's record must have all trials of its study" in capsys.readouterr().err
    assert len(jobs.made) == 2


def test_search_can_maximize(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    options = ["hydra.sweeper.direction=maximize", "hydra.sweeper.metric=loss", "hydra.sweeper.n_trials=4"]
    sweep(*SEARCH, *options, "hydra.sweeper.n_jobs=3")
    best = yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())
    assert best["value"] == max((lr - 3) ** 2 + width for lr, width in jobs.made)
    assert len(jobs.made) == 4


def test_failed_trial_counts_and_is_not_tried_again(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    def before(cfg: DictConfig) -> None:
        if cfg.width == 5:
            raise ValueError("the loss must be finite, got nan")

    jobs.before = before
    options = (*SEARCH, "hydra.sweeper.n_trials=5")
    record = sweep(*options)
    failed = [number for number, job in record.items() if job.status == "failed"]
    assert 0 < len(failed) < 5
    assert record[failed[0]].error == "the loss must be finite, got nan"
    states = [trial.state for trial in study(tmp_path).trials]
    assert [number for number, state in enumerate(states) if state == TrialState.FAIL] == failed
    assert len(jobs.made) == 5 - len(failed)
    sweep(*options)
    assert len(jobs.made) == 5 - len(failed)


def test_trial_that_was_stopped_alone_goes_on_at_once(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    answers = iter([False, None, None])
    begun: list[float] = []

    def before(cfg: DictConfig) -> bool | None:
        begun.append(cfg.lr)
        return next(answers)

    jobs.before = before
    sweep(*SEARCH, "hydra.sweeper.n_trials=2")
    assert begun[0] == begun[1] != begun[2]
    assert [lr for lr, _ in jobs.made] == begun[1:]
    assert [trial.state for trial in study(tmp_path).trials] == [TrialState.COMPLETE] * 2


def test_search_in_which_all_fail_says_so(sweep: Sweep, jobs: Jobs, capfd: pytest.CaptureFixture[str]) -> None:
    def before(cfg: DictConfig) -> None:
        raise OSError("the disk must have room, got none")

    jobs.before = before
    sweep(*SEARCH, "hydra.sweeper.n_trials=2", code=1)
    assert "some trial of a search must end well, all 2 have failed" in capfd.readouterr().err


def die(record: SweepRecord, number: int) -> None:
    """As if the machine had been switched off during a job."""
    record.note(number, "running")


def test_trial_in_which_the_sweep_itself_dies_is_given_up_after_three_times(
    sweep: Sweep, jobs: Jobs, tmp_path: Path
) -> None:
    def before(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    jobs.before = before
    options = (*SEARCH, "hydra.sweeper.n_trials=2")
    record = SweepRecord(tmp_path / "sweep")
    for _ in range(3):
        sweep(*options, code=130)
        die(record, 0)
    assert len(record.jobs()) == 1
    jobs.before = lambda cfg: None
    after = sweep(*options)
    assert (after[0].status, after[0].error) == ("failed", "was interrupted 3 times without a word")
    assert (after[1].status, len(jobs.made)) == ("finished", 1)


def test_trial_whose_end_optuna_was_not_told_is_not_made_again(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    options = (*SEARCH, "hydra.sweeper.n_trials=2")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optuna.Study, "tell", lambda *_, **__: (_ for _ in ()).throw(OSError("no room")))
        sweep(*options, code=1)
    sweep(*options)
    assert len(jobs.made) == 2
    assert [trial.state for trial in study(tmp_path).trials] == [TrialState.COMPLETE] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lr=1"], "a search must have options to choose"),
        (["lr=tag(log,interval(0,1))"], "lr must be an interval or a range that can be searched"),
        (["lr=1,2", "hydra.sweeper.sampler=grid"], "hydra.sweeper.sampler must be tpe or random, got grid"),
        (["lr=1,2", "hydra.sweeper.direction=up"], "hydra.sweeper.direction must be minimize or maximize, got up"),
        (["lr=1,2", "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials must be >= 1, got 0"),
        (["lr=1,2", "hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs must be >= 1, got 0"),
    ],
)
def test_wrong_search_is_refused(
    sweep: Sweep, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    sweep("hydra/sweeper=dalle1_optuna", *options, code=2)
    assert message in capfd.readouterr().err


def test_optuna_must_be_installed(
    sweep: Sweep, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_plugins.dalle1_sweepers.optuna_search.find_spec", lambda name: None)
    # Hydra has run the file of its own plugins once more, apart from the modules.
    plugins = Plugins.instance().class_name_to_class
    monkeypatch.setitem(plugins, "hydra_plugins.dalle1_sweepers.optuna_search.OptunaSweeper", OptunaSweeper)
    sweep(*SEARCH, code=2)
    assert "needs optuna, which is not installed; pip install '.[sweep]'" in capfd.readouterr().err


def test_metric_that_runs_do_not_have_ends_the_search_and_can_be_corrected(
    sweep: Sweep, jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    options = (*SEARCH, "hydra.sweeper.n_trials=2")
    sweep(*options, "hydra.sweeper.metric=val/psnr", code=1)
    message = "hydra.sweeper.metric must be a number of 'sweep/0/summary.json', one of loss, step, got val/psnr"
    assert message in capfd.readouterr().err
    sweep(*options, "hydra.sweeper.metric=val/loss")
    assert len(jobs.made) == 2


def test_search_whose_options_were_wrong_can_be_corrected(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    sweep("hydra/sweeper=dalle1_optuna", "wdth=choice(1,5)", "hydra.sweeper.direction=maximize", code=2)
    sweep(*SEARCH, "hydra.sweeper.n_trials=1")
    assert (len(jobs.made), len(study(tmp_path).trials)) == (1, 1)
    assert study(tmp_path).direction == optuna.study.StudyDirection.MINIMIZE


def test_another_search_is_refused_before_the_first_trial_has_finished(
    sweep: Sweep, jobs: Jobs, capfd: pytest.CaptureFixture[str]
) -> None:
    def before(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    jobs.before = before
    sweep(*SEARCH, code=130)
    sweep("hydra/sweeper=dalle1_optuna", "lr=interval(0.0,9.0)", code=1)
    assert "a search must go on with the options that it began with" in capfd.readouterr().err


def test_another_search_in_the_same_directory_is_refused(sweep: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    sweep(*SEARCH, "hydra.sweeper.n_trials=1")
    sweep(*SEARCH, "mode=eval", "hydra.sweeper.n_trials=2", code=1)
    assert "a search must go on with the options that it began with" in capfd.readouterr().err


def test_space_is_what_the_options_say(sweep: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    space = ["lr=range(0.5,2.5,0.5)", "width=tag(log,int(interval(1,64)))", "mode=train,eval"]
    sweep("hydra/sweeper=dalle1_optuna", *space, "hydra.sweeper.n_trials=1")
    (trial,) = study(tmp_path).trials
    assert trial.distributions == {
        "lr": optuna.distributions.FloatDistribution(0.5, 2.0, step=0.5),
        "width": optuna.distributions.IntDistribution(1, 64, log=True),
        "mode": optuna.distributions.CategoricalDistribution(["train", "eval"]),
    }
