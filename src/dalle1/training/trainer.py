"""Lightning's trainer from the configuration."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from hydra.utils import instantiate
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from dalle1.training.callbacks import RunProgress
from dalle1.training.checkpoints import AtomicCheckpointIO
from dalle1.training.communication import Communication
from dalle1.training.communication_callback import CommunicationCallback, check_communication
from dalle1.training.optim import OptimConfig
from dalle1.training.ranks import keep_collectives_in_mind
from dalle1.training.sharding import FullyShardedStrategy
from dalle1.training.stage_module import StageModule
from dalle1.training.transformer_module import TransformerModule, TransformerOptimConfig


def check_precision(precision: str, optim: OptimConfig) -> None:
    """Raise ValueError unless networks can be trained with `trainer.precision`."""
    if precision.startswith("16") or precision == "bf16-true":
        raise ValueError(
            f"trainer.precision must be 32-true or bf16-mixed, got {precision}: fp16 needs a loss scale, which "
            "clipping here does not know, and averages and logits need weights in fp32"
        )
    has_scales = isinstance(optim, TransformerOptimConfig) and optim.resblock_gradient_scaling
    if has_scales and precision not in ("", "32", "32-true"):
        raise ValueError(
            "trainer.precision must be 32-true with optim.resblock_gradient_scaling, which brings its own fp16, "
            f"got {precision}"
        )


def check_sharding(strategy: object, module: StageModule) -> None:
    """Raise ValueError unless the strategy can train the network as it is to be trained."""
    if not isinstance(strategy, FullyShardedStrategy):
        return
    if not isinstance(module, TransformerModule):
        raise ValueError(
            f"trainer=fsdp must be for stage=transformer, whose blocks it shards, got stage={module.record['kind']}; "
            "use trainer=ddp"
        )
    if module.optim.resblock_gradient_scaling:
        raise ValueError(
            "optim.resblock_gradient_scaling must be false with trainer=fsdp, got true: its scales need whole "
            "gradients; use trainer.precision=bf16-mixed"
        )


def build_trainer(cfg: DictConfig, module: StageModule, run_dir: Path, extra: list[pl.Callback]) -> pl.Trainer:
    """Lightning's trainer, as the groups trainer, callbacks and logger describe it; `extra` come after their callbacks.

    Raises: ValueError if an option does not fit this machine, the network or another option.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # Decoding in the training process is a choice of the configuration, not an oversight.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Steps are counted over epochs, so a short epoch is logged too.
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    arguments = instantiate(cfg.trainer, _convert_="all")
    check_precision(str(arguments.get("precision", "")), module.optim)
    check_sharding(arguments.get("strategy"), module)
    if arguments.get("val_check_interval") == 0:
        raise ValueError("trainer.val_check_interval must be >= 1 update, got 0")
    callbacks = list(instantiate(cfg.callbacks, _convert_="all").values())
    if arguments.get("enable_progress_bar") is False:
        callbacks = [each for each in callbacks if not isinstance(each, RunProgress)]
    communication = instantiate(cfg.communication, _convert_="all")
    keep_collectives_in_mind(run_dir)
    if type(communication) is not Communication:
        # First: a checkpoint, which writes down what has been logged, comes after what it logs.
        callbacks.insert(0, CommunicationCallback(communication, run_dir / "checkpoints", seed=cfg.seed))
    try:
        trainer = pl.Trainer(
            **arguments,
            max_steps=module.optim.max_steps,
            max_epochs=-1,
            # Steps, not epochs, count: data sets may be small or endless.
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=list(instantiate(cfg.logger, _convert_="all").values()),
            callbacks=[*callbacks, *extra],
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,
            default_root_dir=run_dir,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise ValueError(f"trainer options must fit this machine and each other: {error}") from error
    check_communication(communication, trainer.strategy, module)
    return trainer


@contextmanager
def ctrl_c_stays_itself() -> Iterator[None]:
    """Lightning turns Ctrl-C into exit code 1; turn it back."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
