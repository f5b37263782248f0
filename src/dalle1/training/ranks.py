"""The processes of one run, one for each device: started, compared, and ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0  # in which a process may end by itself
_LAST_WORK_SECONDS = 60.0  # that the other processes may take after the first one is done


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of one process per device, which says what has ended one, and ends all with it."""

    # Of this process, by whichever launcher: a second trainer in it finds them running.
    _started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's."""
        super().__init__(*args, **kwargs)
        self.procs = self._started

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the processes and call `function`. Raises: what it raises; ChildProcessError if one has ended it."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            self._started[:] = self.procs
            # In place of Lightning's own observer, which kills this process without a word.
            threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:  # what collectives raise where another process is missing
            time.sleep(_POLL_SECONDS)  # that one may be about to end
            if dead := self._failed():
                raise ChildProcessError(_describe(*dead)) from error
            raise

    def _watch(self) -> None:
        while not (dead := self._failed()):
            if all(process.returncode == 0 for process in self._started):
                return
            time.sleep(_POLL_SECONDS)
        # This process will fail by itself where the others are missing, or has begun to with the same error.
        time.sleep(_GRACE_SECONDS)
        print(f"error: {_describe(*dead)}", file=sys.stderr, flush=True)
        for process in self._started:
            process.kill()
        os._exit(1)

    def _failed(self) -> tuple[int, int] | None:
        """Rank and exit code of a process that has failed."""
        first = self.cluster_environment.node_rank() * self.num_processes
        for local_rank, process in enumerate(self._started, start=1):
            if process.poll():
                return first + local_rank, process.returncode
        return None

    def finish(self) -> None:
        """Wait until all other processes have ended: the next job may want their devices."""
        until = time.monotonic() + _LAST_WORK_SECONDS
        for process in self._started:
            try:
                process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()


def n_started() -> int:
    """How many processes torchrun or srun has started of which this is one; 1 if none of them has."""
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_NTASKS"])
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def check_number(devices: object, nodes: int) -> None:
    """Raise ValueError unless torchrun or srun has started as many processes as the options say."""
    count = n_started()
    if count > 1 and type(devices) is int and devices >= 1 and devices * nodes != count:
        raise ValueError(
            f"trainer.devices * trainer.num_nodes must be the {count} processes that were started, got "
            f"{devices} * {nodes}; change these, or what torchrun or srun is told"
        )


def _describe(rank: int, code: int) -> str:
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    return f"all ranks must go on together, rank {rank} has ended {how}; what it has said is above"


def check_timeout(minutes: float) -> timedelta:
    """As a duration. Raises: ValueError unless it is > 0."""
    if not minutes > 0:
        raise ValueError(f"trainer.strategy.timeout_minutes must be > 0, got {minutes}")
    return timedelta(minutes=minutes)


def keep_collectives_in_mind(directory: Path) -> None:
    """Let NCCL remember its last collectives, and write them as `collectives-rank<rank>` if one takes too long."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # of newer and of older versions
        os.environ.setdefault(name, str(directory.absolute() / "collectives-rank"))


class DDP(DDPStrategy):
    """Every device has the whole model; gradients are averaged (`torch.nn.parallel.DistributedDataParallel`)."""

    def __init__(self, *, timeout_minutes: float, **kwargs: Any) -> None:
        """As Lightning's, whose further arguments it takes.

        Args:
            timeout_minutes: After which a device that waits for another one gives up, > 0; `hang_watch.HangWatch`
                names that one before.
            kwargs: Of `DDPStrategy` and `DistributedDataParallel`.

        Raises: ValueError for another `timeout_minutes`.
        """
        super().__init__(timeout=check_timeout(timeout_minutes), **kwargs)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None, "Lightning has chosen one"
        self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)


def finish_ranks(trainer: pl.Trainer) -> None:
    """Wait for the processes that this one has started."""
    if isinstance(trainer.strategy.launcher, RankLauncher):
        trainer.strategy.launcher.finish()


class Agreement(pl.Callback):
    """Before anything is trained, all processes must have the same configuration and start from the same checkpoint.

    On several nodes each is started with a command line of its own and sees its own file system.
    """

    def __init__(self, cfg: DictConfig, start: str) -> None:
        """Compare `cfg`, and `start`, the checkpoint that this process would go on from, in words."""
        self._facts = {**_flat(OmegaConf.to_container(cfg, resolve=True)), "checkpoint to go on from": start}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare. Raises: ValueError, on all devices, if one differs from the first one."""
        if trainer.world_size == 1:
            return
        facts = trainer.strategy.broadcast(self._facts)
        mine = [
            f"{name} ({self._facts.get(name)}, not {facts.get(name)})"
            for name in sorted({*facts, *self._facts})
            if facts.get(name) != self._facts.get(name)
        ]
        of_all: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(of_all, mine)
        for rank, differing in enumerate(of_all):
            if differing:
                raise ValueError(
                    f"all processes must have the same configuration, process {rank} has another "
                    f"{' and another '.join(differing)}; start all with the same options and the same files"
                )


def _flat(options: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(options, Mapping):
        return {prefix.removesuffix("."): options}
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.")
    return flat
