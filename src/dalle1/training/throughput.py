"""How fast a run trains, and how much of the machine it uses."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

from dalle1.data.loader import ResumableLoader
from dalle1.data.stream import StreamLoader
from dalle1.training.stage_module import StageModule

# Sides of the square matrices by whose product a device's rate is measured: large enough to reach it.
_CPU_SIDE, _GPU_SIDE = 1024, 8192
# A CPU needs so long only for types that it has no instructions for (fp16 mostly), and noise does not matter then.
_SLOW_SECONDS = 0.2


def matmul_rate(device: torch.device, dtype: torch.dtype, *, side: int, repeats: int = 5) -> float:
    """Operations per second (a multiply-add is two) of the fastest of several products of two square matrices."""
    # Random, because processors save power, and clock higher, on constants.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        _wait_for(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
        if device.type == "cpu" and best > _SLOW_SECONDS:
            break
    return 2 * side**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Throughput(pl.Callback):
    """Logs how fast training is, over all devices, and what it waits for.

    `perf/samples_per_second`, and `perf/data_wait`, the share of the time in which the first device waits for its next
    batch. Of stages whose module says what a sample costs, also `perf/tokens_per_second` and `perf/mfu`, the share of
    the machine that is used: of the operations which the model's definition asks for (see `models.accounting`) in what
    the devices reach in plain matrix products, in the type that training multiplies in or in fp32 if that is faster,
    measured when training starts.
    Time for validation, pictures and checkpoints is left out.
    """

    def __init__(self) -> None:
        self._rate = 0.0
        self._samples = self._last_step = 0
        self._waited = 0.0
        self._started: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what the device can do, before activations fill its memory."""
        assert isinstance(pl_module, StageModule), "every stage of ours is one"
        if not pl_module.flops_per_sample:
            return
        device = pl_module.device
        side = _CPU_SIDE if device.type == "cpu" else _GPU_SIDE
        # A CPU may be slow in 16 bits, and not every product has these.
        types = {pl_module.product_dtype, torch.float32}
        self._rate = max(matmul_rate(device, each, side=side) for each in types) * trainer.world_size
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log when Lightning logs."""
        assert isinstance(pl_module, StageModule), "every stage of ours is one"
        if self._started is None:
            # The first batch, and the one after a pause, is where the clock starts: compilers work in it.
            self._start(trainer, pl_module)
            return
        self._samples += len(batch["index"]) * trainer.world_size
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        _wait_for(pl_module.device)
        seconds = time.perf_counter() - self._started
        rate = self._samples / seconds
        pl_module.log("perf/samples_per_second", rate)
        pl_module.log("perf/data_wait", (_waited(trainer) - self._waited) / seconds)
        if pl_module.flops_per_sample:
            pl_module.log("perf/tokens_per_second", rate * pl_module.tokens_per_sample)
            pl_module.log("perf/mfu", rate * pl_module.flops_per_sample / self._rate)
        self._start(trainer, pl_module)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _wait_for(pl_module.device)
        self._samples, self._started = 0, time.perf_counter()
        self._waited = _waited(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._started = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Stop the clock."""
        self._started = None


def _waited(trainer: pl.Trainer) -> float:
    loader = trainer.train_dataloader
    assert isinstance(loader, ResumableLoader | StreamLoader), "a training batch has come from one of them"
    return loader.wait_seconds
