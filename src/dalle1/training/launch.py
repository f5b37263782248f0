"""How the processes of `train.py` begin: each has the same configuration, and none outlives the one that began it.

Started once, `train.py` reads its configuration through Hydra. What it starts itself gets the outcome in a file instead
of composing it again, which in a sweep would give another directory and start the whole sweep once more:

- with `trainer.devices` above 1, the processes of the other devices on this machine (Lightning's launcher starts them);
- in a sweep (`-m`), each job: whatever becomes of its processes, the next job begins with fresh ones.

Under torchrun or srun all processes exist already and each composes the configuration; `ranks.Agreement` compares.
"""

from __future__ import annotations

import json
import logging.config
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue
from pytorch_lightning.utilities import rank_zero_only

from dalle1.cli import MULTIRUN_FLAGS, OptionError, errors_in_one_line
from dalle1.training.ranks import n_started
from dalle1.training.run import SUMMARY, run

# Environment variables: the file with the configuration of the job that a process belongs to, and who has started it.
JOB, PARENT = "DALLE1_JOB", "DALLE1_PARENT"


def is_part_of_job() -> bool:
    """Whether another process of ours has started this one."""
    return JOB in os.environ


@errors_in_one_line()
def run_part_of_job() -> None:
    """What such a process does: the same as all others of its job."""
    _end_with(int(os.environ[PARENT]))
    os.environ[PARENT] = str(os.getpid())
    job = OmegaConf.load(os.environ[JOB])
    logging.config.dictConfig(json.loads(job.logging))
    run(job.cfg)


def start(cfg: DictConfig) -> dict[str, Any]:
    """Do what `cfg` describes, in this process or, as a job of a sweep, in a new one; return its summary.

    Raises: as `run`; ChildProcessError if the job of a sweep has failed.
    """
    hydra_config = HydraConfig.get()
    if int(os.environ.get("NODE_RANK", "0")):  # what Lightning finds out too late, on a node that was started by hand
        rank_zero_only.rank = 1  # type: ignore[attr-defined]
    with tempfile.NamedTemporaryFile("w", prefix="dalle1-job-", suffix=".yaml") as file:
        log = json.dumps(OmegaConf.to_container(hydra_config.job_logging, resolve=True))
        OmegaConf.save(OmegaConf.create({"cfg": _resolved(cfg), "logging": log}), file)
        file.flush()
        # The tasks of submitit's launcher are in a sweep too, but are all there already.
        if hydra_config.mode is RunMode.MULTIRUN and not n_started() > 1:
            return _run_in_new_process(Path(cfg.run_dir), list(hydra_config.overrides.task), file.name)
        with _environment(job_environment(file.name)):
            return run(cfg)


def _resolved(node: DictConfig | ListConfig) -> dict[Any, Any] | list[Any]:
    """Plain values in place of references, which only this process may be able to follow; broken ones stay."""
    names = list(node) if isinstance(node, DictConfig) else range(len(node))
    values = {}
    for name in names:
        try:
            value = node[name]
        except (InterpolationResolutionError, MissingMandatoryValue):
            value = OmegaConf.to_container(node)[name]  # type: ignore[index]
        values[name] = _resolved(value) if OmegaConf.is_config(value) else value
    return values if isinstance(node, DictConfig) else list(values.values())


def refuse_sweep_of_launched_processes(arguments: list[str]) -> None:
    """Raise OptionError for a sweep that each of several processes would make."""
    if n_started() > 1 and any(flag in arguments for flag in MULTIRUN_FLAGS):
        raise OptionError(
            "a sweep must be one process, got several from torchrun or srun; leave these out, as "
            "'python train.py -m trainer=ddp trainer.devices=8 ...' starts the processes of each job itself"
        )


def _run_in_new_process(run_dir: Path, overrides: list[str], job_file: str) -> dict[str, Any]:
    """Do a job of a sweep. Raises: ChildProcessError if it fails; SystemExit with 0 if a signal has stopped it."""
    received: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    # The overrides are for who looks at the list of processes.
    command = [sys.executable, os.path.abspath(sys.argv[0]), *overrides]
    with _handlers(pass_on), subprocess.Popen(command, env=os.environ | job_environment(job_file)) as process:
        processes.append(process)
        if received:  # while it was being started
            process.send_signal(received[-1])
        code = process.wait()
    if received:  # a job that has not begun to train ends by the signal, and has nothing to save
        raise SystemExit(0)
    if code:
        how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        raise ChildProcessError(f"the job in '{os.path.relpath(run_dir)}' must end well, it has ended {how}; see above")
    if not (run_dir / SUMMARY).exists():  # a signal to the job has stopped it
        raise SystemExit(0)
    summary: dict[str, Any] = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    return summary


def job_environment(job_file: str) -> dict[str, str]:
    """What a process that this one starts must know."""
    return {JOB: job_file, PARENT: str(os.getpid())}


@contextmanager
def _handlers(handle: Any) -> Iterator[None]:
    """Handle the signals by which schedulers end jobs; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)


def _end_with(parent: int) -> None:
    """End when the process that has started this one does: its devices would wait for each other for long."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
