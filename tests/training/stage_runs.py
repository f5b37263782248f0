"""What the tests of runs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Train = Callable[..., dict[str, Any]]  # the fixture `train`
TrainScript = Callable[..., str]  # the fixture `train_script`
STAGES = ("dvae", "clip", "transformer")


def last(results: Path, stage: str) -> Path:
    """The checkpoint of a stage."""
    return results / stage / "checkpoints" / "last.ckpt"


def stop_at_step(step: int) -> Callable[..., None]:
    """The checkpoint callback's own work, and then a dead process after update `step`."""
    from dalle1.training.checkpoints import LastCheckpoint

    work = LastCheckpoint.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, *rest: Any) -> None:
        work(self, trainer, *rest)
        if trainer.global_step == step:
            raise SystemExit(1)

    return on_train_batch_end
