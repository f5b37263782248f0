"""Jobs of a sweep through its launcher, until all have ended or somebody asks for an end."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from dalle1.training.sweep_record import Job

logger = logging.getLogger(__name__)
_SUBDIR = "${hydra:job.num}"  # of conf/train.yaml


def fixed_option(override: Override) -> str:
    """An option that has one value in all jobs, as the command line has it."""
    name = override.get_key_element()
    # Hydra's own sweeper gives an option that is left out, `~name`, a value, which Hydra then refuses.
    is_left_out = override.is_delete() and override.value() is None
    return name if is_left_out else f"{name}={override.get_value_element_as_str()}"


def _last_line(error: object) -> str:
    """What an error says at the end; some say nothing but what they are."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


class LaunchedJobs:
    """The jobs of one sweep, by number; job n is in the directory n of the sweep's.

    A context: no other command works on the sweep until it is left.

    Attributes:
        known: What earlier starts of the sweep have left of its jobs.
    """

    def __init__(self, config: DictConfig, hydra_context: HydraContext, task_function: TaskFunction) -> None:
        """Jobs that `task_function` does.

        Raises: HydraException for a `hydra.sweep.subdir`.
        """
        from hydra.core.plugins import Plugins

        from dalle1.training.sweep_record import SweepRecord

        subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[call-overload, index]
        if subdir != _SUBDIR:
            raise HydraException(f"hydra.sweep.subdir must stay as it is, since jobs have numbers, got {subdir}")
        # Read by submitit when it is imported: its own signal, SIGUSR2, would end a training process at once.
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
        self.directory = Path(str(config.hydra.sweep.dir))
        self._record = SweepRecord(self.directory)
        self._launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._config = config
        self.known: dict[int, Job] = {}

    def __enter__(self) -> LaunchedJobs:
        """Raises: ValueError if another command works on the sweep, or as `SweepRecord.jobs`."""
        with ExitStack() as held:
            held.enter_context(self._record.hold())
            self.known = self._record.begin()
            OmegaConf.save(self._config, self.directory / "multirun.yaml")
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def is_done(self, number: int) -> bool:
        """Whether a job has finished, and what it has made is still there; a line says so."""
        job = self.known.get(number)
        if job is None or job.status != "finished" or not (self.directory / str(number) / "summary.json").exists():
            return False
        value = "" if job.value is None else f": {job.metric} {job.value:.6g}"
        logger.info("job %d is complete%s", number, value)
        return True

    def run(self, overrides: Mapping[int, Sequence[str]]) -> dict[int, Job]:
        """Launch jobs, given the options of each, and wait for all; return what has become of them.

        Raises: SystemExit with 0 once they are stopped, if somebody asks this process for an end by SIGTERM or
            SIGUSR1; ChildProcessError if the launcher gives up.
        """
        self._record.await_jobs(overrides)
        batch = [[*options, f"hydra.sweep.subdir={number}"] for number, options in overrides.items()]
        with self._stop_signals():
            try:
                results = self._launcher.launch(batch, initial_job_idx=min(overrides))
            except Exception as error:
                raise ChildProcessError(
                    f"the launcher must see all jobs end, it has given up ({_last_line(error)}); "
                    f"those that go on say so in '{self.directory}', and the same command goes on with all others"
                ) from error
            if self._record.is_asked_to_stop():
                raise SystemExit(0)
        jobs = self._record.jobs()
        for number, result in zip(overrides, results, strict=True):
            if jobs[number].status in ("waiting", "running"):  # it has failed before it could say anything
                self._record.note(number, "failed", error=_last_line(result._return_value))
        self.known = self._record.jobs()
        return {number: self.known[number] for number in overrides}

    def note_failed(self, number: int, error: str) -> None:
        """Note that a job has failed that is not to be launched again."""
        self._record.note(number, "failed", error=error)

    def command(self, options: Sequence[str]) -> str:
        """What does a job outside of a sweep."""
        return shlex.join(["python", "train.py", *options])

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        def ask(*_: Any) -> None:
            self._record.ask_to_stop()

        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
