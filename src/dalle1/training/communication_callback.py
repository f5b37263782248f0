"""Makes DDP send gradients as `communication=` says, counts what is sent, and keeps its state with the checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from dalle1.training.bad_updates import BadUpdates
from dalle1.training.communication import Bf16, Bf16Reducer, Communication, Reducer, average_bucket
from dalle1.training.disk_full import is_disk_full
from dalle1.training.powersgd import PowerSGD, PowerSGDReducer
from dalle1.training.powersgd_files import load_state, remove_orphans, save_state
from dalle1.training.stage_module import StageModule
from dalle1.training.transformer_module import TransformerModule

logger = logging.getLogger(__name__)


def check_communication(communication: Communication, strategy: object, module: StageModule) -> None:
    """Raise ValueError unless gradients can be sent so: under DDP, and with something to compress."""
    if type(communication) is Communication:
        return
    name = type(communication).__name__.lower()
    if not isinstance(strategy, DDPStrategy):
        raise ValueError(
            "communication must be plain without DDP, in which every device has the whole gradient, got "
            f"communication={name} with {type(strategy).__name__}; use trainer=ddp"
        )
    shapes = {name: weight.shape for name, weight in module.model.named_parameters()}
    if isinstance(communication, PowerSGD) and not any(communication.cut(*each) for each in shapes.items()):
        raise ValueError(
            "communication=powersgd must have matrices in blocks that are larger than their factors, got none of "
            f"{len(shapes)} weights in a {type(module.model).__name__}; use communication=bf16, or a lower "
            "communication.rank"
        )


class CommunicationCallback(pl.Callback):
    """Registers our hook with DDP; Lightning would do so on CUDA alone.

    Logs of every update `perf/sent_megabytes`, the 10^6 bytes that this device has handed to all-reduce, and
    `perf/sent_saved`, the share of plain fp32 that it has not."""

    def __init__(self, communication: Communication, checkpoints: Path, *, seed: int) -> None:
        """Send as `communication`, which is not plain, says; `seed` decides its random numbers."""
        self._communication = communication
        self._checkpoints = checkpoints
        self._seed = seed
        self._reducer: Reducer | None = None
        self._counted = (0, 0)
        self._last_step = self._n_bad = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Register the hook: checkpoints are loaded, and no gradient has been sent."""
        self._reducer = self._make_reducer(pl_module)
        self._counted, self._last_step = (0, 0), trainer.global_step
        if isinstance(self._reducer, PowerSGDReducer) and trainer.global_step:
            state = load_state(
                self._checkpoints,
                step=trainer.global_step,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
            # All or none: they must have the same Q.
            if trainer.strategy.reduce_boolean_decision(state is not None) and state is not None:
                self._reducer.load(*state)
            if trainer.is_global_zero:
                remove_orphans(self._checkpoints, trainer.global_step)
        cast("DistributedDataParallel", trainer.strategy.model).register_comm_hook(self._reducer, average_bucket)

    def _make_reducer(self, module: pl.LightningModule) -> Reducer:
        if isinstance(self._communication, Bf16):
            return Bf16Reducer()
        assert isinstance(self._communication, PowerSGD), "a third way to send would need a reducer"
        scaling = module.scaling if isinstance(module, TransformerModule) else None
        scales = scaling.by_weight() if scaling is not None else None
        return PowerSGDReducer(self._communication, module.model, seed=self._seed, scales=scales)  # type: ignore[arg-type]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the update has sent (a batch that only accumulates sends nothing).

        Of an update that was thrown away nothing may come back later.
        """
        if trainer.global_step == self._last_step or self._reducer is None:
            return
        self._last_step = trainer.global_step
        bad_updates: BadUpdates | None = pl_module.bad_updates  # type: ignore[assignment]
        n_bad = bad_updates.count if bad_updates is not None else 0
        if n_bad > self._n_bad and isinstance(self._reducer, PowerSGDReducer):
            self._reducer.forget_errors()
        self._n_bad = n_bad
        sent, plain = self._reducer.sent_bytes - self._counted[0], self._reducer.plain_bytes - self._counted[1]
        self._counted = (self._reducer.sent_bytes, self._reducer.plain_bytes)
        pl_module.log("perf/sent_megabytes", sent / 1e6)
        pl_module.log("perf/sent_saved", 1 - sent / plain)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write this device's state, and wait for all others: the checkpoint gets its name after that.

        Where the disk is full the checkpoint has none, and a run that goes on from it begins with nothing owed.

        Raises: OSError or RuntimeError on all devices if one of them could not write for another reason.
        """
        if not isinstance(self._reducer, PowerSGDReducer):
            return
        if trainer.is_global_zero:  # such as those of a `best.ckpt` that is no more
            remove_orphans(self._checkpoints, trainer.global_step)
        failure: Exception | None = None
        try:
            save_state(
                self._checkpoints,
                step=trainer.global_step,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                errors=self._reducer.errors(),
                queries=self._reducer.queries(),
            )
        except (OSError, RuntimeError) as error:
            if is_disk_full(error):
                logger.warning(
                    "what PowerSGD has not sent after update %d is not saved: %s", trainer.global_step, error
                )
            else:
                failure = error
        if not trainer.strategy.reduce_boolean_decision(failure is None):
            raise failure or OSError(f"another device could not write into '{self._checkpoints}'; see its message")
