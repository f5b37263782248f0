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
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue
from pytorch_lightning.utilities import rank_zero_only

from dalle1.cli import MULTIRUN_FLAGS, OptionError, errors_in_one_line
from dalle1.training.ranks import n_started
from dalle1.training.run import run
from dalle1.training.sweep_job import SweepJob, name_sweep, write_error

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
    job_file = Path(os.environ[JOB])
    job = OmegaConf.load(job_file)
    logging.config.dictConfig(json.loads(job.logging))
    try:
        run(job.cfg)
    except Exception as error:
        write_error(job_file, error)
        raise


def start(cfg: DictConfig) -> dict[str, Any]:
    """Do what `cfg` describes, in this process or, as a job of a sweep, in a new one; return its summary.

    That of a job that was stopped is empty.

    Raises: as `run`; ChildProcessError if the job of a sweep has failed.
    """
    hydra_config = HydraConfig.get()
    if int(os.environ.get("NODE_RANK", "0")):  # what Lightning finds out too late, on a node that was started by hand
        rank_zero_only.rank = 1  # type: ignore[attr-defined]
    is_sweep = hydra_config.mode is RunMode.MULTIRUN
    if is_sweep:
        name_sweep(cfg, hydra_config)
    with tempfile.TemporaryDirectory(prefix="dalle1-job-") as directory:
        job_file = Path(directory, "job.yaml")
        log = json.dumps(OmegaConf.to_container(hydra_config.job_logging, resolve=True))
        OmegaConf.save(OmegaConf.create({"cfg": _resolved(cfg), "logging": log}), job_file)
        environment = job_environment(str(job_file))
        if not is_sweep:
            return _run_here(cfg, environment)
        job = SweepJob(cfg, hydra_config)
        # The tasks of submitit's launcher are in a sweep too, but are all there already.
        if n_started() > 1:
            return job.run(lambda: _run_unless_stopped(cfg, environment))
        return job.run(lambda: job.in_new_process(job_file, environment))


def _run_here(cfg: DictConfig, environment: dict[str, str]) -> dict[str, Any]:
    with _environment(environment):
        return run(cfg)


def _run_unless_stopped(cfg: DictConfig, environment: dict[str, str]) -> dict[str, Any] | None:
    """The summary, or None if a signal has stopped the run."""
    try:
        return _run_here(cfg, environment)
    except SystemExit:
        return None


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


def job_environment(job_file: str) -> dict[str, str]:
    """What a process that this one starts must know."""
    return {JOB: job_file, PARENT: str(os.getpid())}


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


if __name__ == "__main__":
    run_part_of_job()
