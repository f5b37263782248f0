"""Several devices in the threads of one process: what `torch.distributed` is to the code that averages gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Devices:
    """`count` devices, each a thread; all-reduce adds up in the order of their numbers, in the tensors' type."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._here = threading.local()
        self._all_are_here = threading.Barrier(count, timeout=20)
        self._given: list[Tensor] = [torch.empty(0)] * count

    def get_world_size(self) -> int:
        return self.count

    def all_reduce(self, tensor: Tensor, *, async_op: bool) -> Any:
        assert async_op
        self._given[self._here.rank] = tensor.clone()
        self._all_are_here.wait()
        total = self._given[0].clone()
        for other in self._given[1:]:
            total += other
        self._all_are_here.wait()
        done: torch.futures.Future[None] = torch.futures.Future()
        tensor.copy_(total)
        done.set_result(None)
        return done

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What `work(rank)` returns on each device."""

        def on(rank: int) -> T:
            self._here.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(on, range(self.count)))


class Bucket:
    """Gradients as DDP hands them over: views of one buffer."""

    def __init__(self, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
        parts = self._buffer.split([gradient.numel() for gradient in gradients])
        self._gradients = [part.view(each.shape) for part, each in zip(parts, gradients, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        return self._weights

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def buffer(self) -> Tensor:
        return self._buffer
