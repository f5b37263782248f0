"""Kernels recorded once and then launched together (a CUDA graph).

A step for few sequences has hundreds of kernels of some microseconds, and Python takes longer to launch each than it
runs. A graph launches all of them at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Libraries, kernels and compiled parts are loaded at the first call, the second is like any other.
_CALLS_BEFORE = 2


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same: libraries keep some memory for every stream that they have seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class NotRecordedError(RuntimeError):
    """PyTorch could not record a function that it can execute."""


class CudaGraph:
    """What a function did when it was recorded, to be done again in the same memory."""

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        """Call `function` a few times on `device`, then record it.

        It must wait for nothing, allocate nothing that outlives it but its result, and be allowed to be called again.
        The tensors that it reads and writes must live as long as this.

        Raises: NotRecordedError if PyTorch cannot record it; what `function` raises without recording.
        """
        with torch.cuda.device(device):
            side, current = _side_stream(device), torch.cuda.current_stream(device)
            self._graph = torch.cuda.CUDAGraph()
            side.wait_stream(current)
            # Ours, not only `torch.cuda.graph`'s: that leaves its stream the current one when recording fails.
            with torch.cuda.stream(side):
                for _ in range(_CALLS_BEFORE):
                    function()
                current.wait_stream(side)
                # Other threads may go on, such as one that pins memory for training.
                try:
                    with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                        self._result = function()
                except torch.OutOfMemoryError:
                    raise  # there is no more of it without a graph
                except RuntimeError as error:
                    raise NotRecordedError(str(error).partition("\n")[0]) from error

    def replay(self) -> Tensor:
        """Do it again; its result, which the next call overwrites."""
        self._graph.replay()
        return self._result


def try_to_record(function: Callable[[], Tensor], device: torch.device) -> CudaGraph | None:
    """A graph of `function`, see `CudaGraph`; None where there is no CUDA, or, with a warning, if it fails."""
    if device.type != "cuda":
        return None
    try:
        return CudaGraph(function, device)
    except NotRecordedError as error:
        logger.warning("decoding goes on without a CUDA graph, which is slower: %s", error)
        return None
