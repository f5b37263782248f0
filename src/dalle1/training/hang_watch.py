"""When the devices of a run wait for each other and nothing goes on, somebody has to say for which one."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.trainer.states import TrainerFn
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

_LONGEST_INTERVAL_SECONDS = 10.0
_INTERVALS = 8  # of which at least so many make the timeout: a process is silent if it misses three
_KEY = "dalle1/hang_watch"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is. Ranks that do the same have the same `count`."""

    rank: int
    host: str
    beats: int  # grows for as long as the process lives
    count: int  # grows with everything that is begun
    doing: str


class HangWatch(pl.Callback):
    """Ends a run in which nothing goes on for too long, with a line that names the rank the others wait for.

    A thread in every process tells the others where its process is, through the store by which they have found each
    other, so training pays nothing for it. If nothing has gone on here for `timeout_minutes`, the first rank (or, if
    that one does not answer, each) says what the last one in the order of work does; as long again after that the
    process ends with code 1. Before, if it is shorter, `trainer.strategy.timeout_minutes` ends what waits in a
    collective; see `ranks.keep_collectives_in_mind`.
    """

    def __init__(self, timeout_minutes: float) -> None:
        """Watch from where the network is on its device.

        Raises: ValueError unless `timeout_minutes` > 0.
        """
        if not timeout_minutes > 0:
            raise ValueError(f"callbacks.hang_watch.timeout_minutes must be > 0, got {timeout_minutes}")
        self._timeout = 60 * timeout_minutes
        self._interval = min(self._timeout / _INTERVALS, _LONGEST_INTERVAL_SECONDS)
        self._count = 0
        self._doing = "training begins"
        self._hooks = 0  # that training has come to
        self._ended = threading.Event()
        self._ended.set()  # not begun
        self._end_others: Callable[[Any], None] | None = None  # of processes that this one has started

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch."""
        self._start(trainer)

    def _start(self, trainer: pl.Trainer) -> None:
        self._ended = ended = threading.Event()
        self._begin("begins")
        rank, world = trainer.global_rank, trainer.world_size
        launcher = trainer.strategy.launcher
        self._end_others = launcher.kill if isinstance(launcher, _SubprocessScriptLauncher) else None
        threading.Thread(
            target=self._watch, args=(rank, world, _store(world), ended), name="hang-watch", daemon=True
        ).start()

    def _begin(self, what: str) -> None:
        self._doing, self._count, self._hooks = what, self._count + 1, self._hooks + 1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """It computes."""
        self._begin(f"computes update {trainer.global_step + 1:,}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """It waits for data, if nothing else follows."""
        self._begin(f"waits for the data that follow update {trainer.global_step:,}")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """It saves."""
        self._begin(f"saves the checkpoint of update {trainer.global_step:,}")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """It validates, which may be all that is left to do."""
        if self._ended.is_set():
            self._start(trainer)
        self._begin(f"begins the validation after update {trainer.global_step:,}")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """It validates a batch. Not counted: ranks may have one more than others."""
        self._doing, self._hooks = f"validates after update {trainer.global_step:,}", self._hooks + 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """It goes on."""
        self._begin(f"goes on after the validation at update {trainer.global_step:,}")
        if trainer.state.fn != TrainerFn.FITTING:
            self._ended.set()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch no more."""
        self._ended.set()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no more."""
        self._ended.set()

    def _watch(self, rank: int, world: int, store: TCPStore | None, ended: threading.Event) -> None:
        beats = idle = seen = 0
        told = False
        host = socket.gethostname()
        while not ended.wait(self._interval):
            beats += 1
            mine = Place(rank=rank, host=host, beats=beats, count=self._count, doing=self._doing)
            # By these beats, not by a clock: a process that was stopped for a while must not end when it goes on.
            idle, seen = (idle + 1 if seen == self._hooks else 0), self._hooks
            still = idle * self._interval
            try:
                if store is not None:
                    store.set(f"{_KEY}/{rank}", json.dumps(asdict(mine)))
                if still < self._timeout or told:
                    places = None
                else:
                    places = self._look(world, store, ended) if store is not None else ([mine], [])
            except (DistError, RuntimeError, OSError):
                # The store is in the first process; if that has gone, the run is over.
                self._end("nothing goes on: rank 0 does not answer; this process ends")
            if places is not None:
                told = True
                if rank == 0:
                    _say(f"nothing has gone on for {still / 60:.3g} minutes: {describe(*places)}")
            if still >= 2 * self._timeout:
                self._end(f"still nothing after {still / 60:.3g} minutes; this process ends")
            told = told and still >= self._timeout

    def _end(self, why: str) -> None:
        _say(why)
        if self._end_others is not None:
            self._end_others(signal.SIGKILL)  # one that is stopped hears nothing else
        os._exit(1)

    def _look(self, world: int, store: TCPStore, ended: threading.Event) -> tuple[list[Place], list[Place]]:
        """Where all ranks are, and those of them that say nothing."""
        first = _places(world, store)
        if ended.wait(3 * self._interval):
            return first, []
        # This thread was busy here, and the first rank must not seem silent to itself.
        second = _places(world, store)
        silent = [new for old, new in zip(first[1:], second[1:], strict=True) if new.beats == old.beats]
        return second, silent


def describe(places: list[Place], silent: list[Place]) -> str:
    """What the ranks wait for: those that say nothing, or else those that are behind the others."""
    if silent:
        return "the others wait for " + " and ".join(
            f"rank {each.rank} (on {each.host}), which says nothing any more; the last that it said is that it "
            f"{each.doing}"
            for each in silent
        )
    last = min(places, key=lambda place: place.count)
    first = max(places, key=lambda place: place.count)
    if len(places) == 1:
        return f"the process {last.doing}"
    if last.count == first.count:
        return f"all {len(places)} ranks are at the same place, rank 0 {places[0].doing}"
    behind = [place for place in places if place.count == last.count]
    names = " and ".join(f"rank {place.rank} (on {place.host}), which {place.doing}" for place in behind)
    return f"rank {first.rank} {first.doing} and waits for {names}"


def _places(world: int, store: TCPStore) -> list[Place]:
    places = []
    for rank in range(world):
        key = f"{_KEY}/{rank}"
        if store.check([key]):
            places.append(Place(**json.loads(store.get(key))))
        else:
            places.append(Place(rank=rank, host="?", beats=0, count=0, doing="has not begun to train"))
    return places


def _store(world: int) -> TCPStore | None:
    """A connection of its own to where the processes have found each other: no collective can occupy it."""
    if world == 1:
        return None
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    clone: TCPStore = store.clone()
    return clone


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
