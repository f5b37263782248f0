"""A job of a sweep, wherever its launcher runs it: in processes of its own, and in the sweep's record."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from dalle1.cli import describe
from dalle1.training.run import SUMMARY
from dalle1.training.sweep_record import SweepRecord, metric_of

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
# Asks a job to save and end; SLURM's limit of time and preemption come as the second, see docs/sweeps.md.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class SweepJob:
    """One job of a sweep.

    Whoever is asked to stop it (this process by a signal, the sweep's first process, or the job itself), it saves its
    state and counts as stopped: the same command goes on with it.
    """

    def __init__(self, cfg: DictConfig, hydra_config: HydraConf) -> None:
        """The job that `cfg` describes, in the sweep that `hydra_config` does."""
        launcher = str(hydra_config.launcher["_target_"])
        self._is_in_first_process = launcher.endswith("BasicLauncher")
        self._is_in_worker = "joblib" in launcher
        self._record = SweepRecord(str(hydra_config.sweep.dir))
        self._number = int(str(hydra_config.sweep.subdir))
        self._overrides = [str(each) for each in hydra_config.overrides.task]
        self._run_dir = Path(cfg.run_dir)
        self._received = 0  # the signal that asks this process for an end
        self._metric = OmegaConf.select(hydra_config, "sweeper.metric") or cfg.stage.get("monitor")  # type: ignore[arg-type]

    def run(self, work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Do the job by `work`, which returns its summary, or None if it was stopped; return that, or an empty one.

        Raises: what `work` raises; SystemExit with 0 if no other job may begin in this process.
        """
        if self._record.is_asked_to_stop():
            return self._stop()
        self._note("running", overrides=self._overrides)
        logger.info("job %d begins in '%s'", self._number, os.path.relpath(self._run_dir))
        try:
            summary = work()
        except Exception as error:
            self._note("failed", error=getattr(error, "said", None) or describe(error) or repr(error))
            raise
        except BaseException:  # Ctrl-C
            self._note("stopped")
            raise
        if summary is None:
            self._note("stopped")
            return self._stop()
        self._note("finished", error=None, metric=self._metric, value=metric_of(summary, self._metric))
        return summary

    def in_new_process(self, job_file: Path, environment: dict[str, str]) -> dict[str, Any] | None:
        """Do it in a process that gets `environment`; return its summary, None if it was stopped.

        Raises: ChildProcessError if it fails; its `said` is the error's line, if the process has left one.
        """
        parent = os.getppid()
        asked = False
        # By the module: a launcher may have started this process by a script of its own. The overrides are for who
        # looks at the list of processes.
        command = [sys.executable, "-m", "dalle1.training.launch", *self._overrides]
        with self._signals_noted() as before, subprocess.Popen(command, env=os.environ | environment) as process:
            while (code := _wait(process)) is None:
                # A worker of joblib whose first process has died is nobody's.
                is_orphan = self._is_in_worker and os.getppid() != parent
                if not asked and (self._received or self._record.is_asked_to_stop() or is_orphan):
                    process.send_signal(self._received or signal.SIGTERM)
                    asked = True
        if asked:  # a job that has not begun to train ends by the signal, and has nothing to save
            if "SUBMITIT_EXECUTOR" in os.environ and callable(before.get(self._received)):
                self._note("stopped")
                with suppress(Exception):  # by which it says that the job is not to come again
                    before[self._received](self._received, None)
            return None
        if -code in _SIGNALS:  # one to the job itself, before it could save anything
            return None
        if code:
            raise _failure(self._run_dir, code, job_file)
        if not (self._run_dir / SUMMARY).exists():  # a signal to the job has stopped it
            return None
        summary: dict[str, Any] = json.loads((self._run_dir / SUMMARY).read_text(encoding="utf-8"))
        return summary

    @contextmanager
    def _signals_noted(self) -> Iterator[dict[int, Any]]:
        """Note signals that ask for an end; only the main thread can. Yields the handlers before."""
        before: dict[int, Any] = {}

        def note(number: int, _: FrameType | None) -> None:
            self._received = number

        if threading.current_thread() is threading.main_thread():
            before |= {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield before
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> dict[str, Any]:
        if self._is_in_first_process and (self._received or self._record.is_asked_to_stop()):
            raise SystemExit(0)
        return {}

    def _note(self, status: Any, **changes: Any) -> None:
        # Launchers with several tasks for a job: the first one speaks.
        rank_zero_only(self._record.note)(self._number, status, **changes)


def name_sweep(cfg: DictConfig, hydra_config: HydraConf) -> None:
    """In Weights & Biases the jobs of a sweep are runs with their numbers in a group of its name."""
    options = cfg.logger.get("wandb")
    if options is not None:
        options.name = f"{options.name}-{hydra_config.sweep.subdir}"
        if options.group is None:
            options.group = Path(str(hydra_config.sweep.dir)).name


def write_error(job_file: Path, error: Exception) -> None:
    """Leave an error's line beside the job's file, for whoever waits for the process."""
    error_file(job_file).write_text(describe(error) or f"{type(error).__name__}: {error}", encoding="utf-8")


def error_file(job_file: Path) -> Path:
    """Where the processes of a job leave what has ended them."""
    return job_file.with_suffix(".error")


def _failure(run_dir: Path, code: int, job_file: Path) -> ChildProcessError:
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    failure = ChildProcessError(f"the job in '{os.path.relpath(run_dir)}' must end well, it has ended {how}; see above")
    said = error_file(job_file)
    failure.said = said.read_text(encoding="utf-8") if said.exists() else None  # type: ignore[attr-defined]
    return failure


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None
