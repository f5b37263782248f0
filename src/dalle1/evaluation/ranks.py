"""The processes of one evaluation, as torchrun starts them: each takes its share, and they wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dalle1.pipeline import choose_device

# They only wait for each other, and the first may have much more to do.
_LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the command."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that computes what is not shared, and reports."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """Which of n pieces of work are this process's: every `world_size`-th one."""
        return range(self.rank, n, self.world_size)

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.world_size > 1:
            dist.barrier()

    def choose_device(self, name: str) -> torch.device:
        """As `pipeline.choose_device`; with `auto` or `cuda` each process of a machine has its own GPU."""
        device = choose_device(name)
        if device.type == "cuda" and device.index in (None, 0) and name in ("auto", "cuda"):
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return device


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes that torchrun has started; this one alone without it.

    What they compute goes through files, so that gloo will do on all devices, and the cache must be one that all see.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    try:
        yield Ranks(rank=dist.get_rank(), world_size=world_size)
    finally:
        dist.destroy_process_group()
