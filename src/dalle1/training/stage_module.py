"""What the training of every network has in common: optimizer, clipping, logging, the checkpoint's record."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dalle1.checkpoint import OPTIONS_KEY, RECORD_KEY, SECONDS_KEY, make_record
from dalle1.data.dataset import Batch
from dalle1.models.clip import CLIP
from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.text import TextTokenizer
from dalle1.training.optim import OptimConfig, build_optimizer


def step_seed(seed: int, rank: int, step: int, *batch: int) -> int:
    """Seed of one update on one rank, in [0, 2^32): PyTorch's CPU generator uses no more than 32 bits.

    With the number of a validation `batch`, its seed after that update."""
    text = "|".join(str(number) for number in (seed, rank, step, *batch))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class StageModule(pl.LightningModule):
    """Trains one network, `model`; subclasses add the loss and the metrics."""

    def __init__(
        self,
        model: DVAE | CLIP | DalleTransformer,
        optim: OptimConfig,
        *,
        seed: int,
        text_tokenizer: TextTokenizer | None = None,
        dvae_sha256: str | None = None,
        caption_dropout: float = 0.0,
    ) -> None:
        """Train `model`.

        Args:
            model: The network, already initialised.
            optim: Numbers of the optimizer.
            seed: Decides all randomness of the training steps.
            text_tokenizer: Made the text tokens; travels in the checkpoint.
            dvae_sha256: Hash of the dVAE whose image tokens are learned; travels in the checkpoint.
            caption_dropout: Share of captions left out, in [0, 1); travels in the checkpoint.
        """
        super().__init__()
        self.model = model
        self.optim = optim
        self.seed = seed
        self.text_tokenizer = text_tokenizer
        # What else a run that continues this one must have in common with it; see `training.run`.
        self.options: dict[str, Any] = {}
        self.alarm: str | None = None  # what the last validation found wrong, in one sentence; goes into the summary
        # Weights that this update set anew, by their names in `model`: their average starts over.
        self.fresh_weights: set[str] = set()
        self.earlier_seconds = 0.0  # what earlier starts of this run took, up to the checkpoint that it continues from
        self._started = time.monotonic()
        self.record = make_record(
            model, text_tokenizer=text_tokenizer, dvae_sha256=dvae_sha256, caption_dropout=caption_dropout
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and a learning rate that changes every update."""
        optimizer = build_optimizer(self.model, self.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optim.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the norm of the whole gradient as the optimizer config says, and log it."""
        limit = self.optim.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.log("train/grad_norm", norm)
        # Before the weights change: the last checkpoint stays good.
        if not torch.isfinite(norm):
            raise ValueError(
                f"the gradient must stay finite, got norm {float(norm)} at step {self.global_step}; "
                "set a lower optim.lr, then start again to continue from the last checkpoint"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record that rebuilds the network, the run's options and how long it took so far."""
        checkpoint[RECORD_KEY] = self.record
        checkpoint[OPTIONS_KEY] = self.options
        checkpoint[SECONDS_KEY] = self.earlier_seconds + time.monotonic() - self._started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count on from the time of earlier starts."""
        self.earlier_seconds = checkpoint[SECONDS_KEY]

    def draw_pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """Pictures, by their names, of what the network does with validation samples; drawn after each validation."""
        return {}

    def step_generator(self, *batch: int) -> torch.Generator:
        """Randomness of this update on this rank: a function of the seed and the step, so resuming needs no state.

        With the number of a validation `batch`, that of this batch."""
        generator = torch.Generator(self.device)
        generator.manual_seed(step_seed(self.seed, self.global_rank, self.global_step, *batch))
        return generator

    def log_means(self, split: str, values: dict[str, Tensor | float], batch_size: int) -> None:
        """Log values as `split/name`: means over the set and over ranks in validation, of one batch in training."""
        for name, value in values.items():
            self.log(
                f"{split}/{name}",
                value,
                # Lightning averages these weights over ranks in whole numbers: multiples of their number stay exact.
                batch_size=batch_size * self.trainer.world_size,
                on_step=split == "train",
                on_epoch=split != "train",
                sync_dist=split != "train",
            )
