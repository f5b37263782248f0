"""What the training of every network has in common: optimizer, clipping, logging, the checkpoint's record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dalle1.checkpoint import OPTIONS_KEY, PLATEAU_KEY, RECORD_KEY, SECONDS_KEY, make_record
from dalle1.data.preparation import Batch
from dalle1.models.clip import CLIP
from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.text import TextTokenizer
from dalle1.training.bad_updates import BadUpdates
from dalle1.training.optim import OptimConfig, build_optimizer, clip_variance
from dalle1.training.plateau import PlateauHalving
from dalle1.training.sharding import in_whole


def derive_seed(*numbers: int | str) -> int:
    """A seed of its own for each list of numbers, in [0, 2^32): PyTorch's CPU generator uses no more than 32 bits."""
    text = "|".join(map(str, numbers))
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
        # Operations of one update and tokens, per sample; stages that leave 0 have no `perf/` metrics.
        self.flops_per_sample = self.tokens_per_sample = 0
        self.alarm: str | None = None  # what the last validation found wrong, in one sentence; goes into the summary
        self.bad_updates: BadUpdates | None = None  # decides which updates are made, once training begins
        self.part = 0  # batches of the coming update that have given their gradients
        self._sums: dict[str, Any] = {}  # of what is logged of it: sum and count of each
        # Weights that this update set anew, by their names in `model`: their average starts over.
        self.fresh_weights: set[str] = set()
        self._plateau = PlateauHalving(optim, self._mean_over_ranks) if optim.lr_schedule == "plateau" else None
        self.earlier_seconds = 0.0  # what earlier starts of this run took, up to the checkpoint that it continues from
        self._started = time.monotonic()
        self.record = make_record(
            model, text_tokenizer=text_tokenizer, dvae_sha256=dvae_sha256, caption_dropout=caption_dropout
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and a learning rate that changes every update."""
        optimizer = build_optimizer(self.model, self.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        return self.optim.lr_factor(step) * (self._plateau.share if self._plateau else 1.0)

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        mean = self.trainer.strategy.reduce(value, reduce_op="mean")
        assert isinstance(mean, Tensor), "one tensor in, one tensor out"
        return mean

    def on_after_backward(self) -> None:
        """Count the batches of an update."""
        self.part += 1

    def on_before_backward(self, loss: Tensor) -> None:
        """Show the loss to the schedule; parts of an accumulated update sum to its mean loss."""
        if self._plateau:
            self._plateau.add(loss)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the rate of the next update."""
        if self._plateau:
            self._plateau.end_update()
        scheduler.step()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Update, and free the gradients: the next forward pass, where memory peaks, needs no old ones."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.part = 0
        optimizer.zero_grad(set_to_none=True)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the norm of the whole gradient, and the variance, as the optimizer config says; log norm and rate."""
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        if not self.unscale_gradients():
            # Without gradients the optimizer changes neither weights nor moments. The step counts all the same.
            optimizer.zero_grad(set_to_none=True)
            return
        limit = self.optim.grad_clip_norm or float("inf")
        norm = in_whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.log("train/grad_norm", norm)
        # Before the weights change: the last checkpoint stays good.
        if self.bad_updates is None:
            if not torch.isfinite(norm):
                raise ValueError(
                    f"the gradient must stay finite, got norm {float(norm)} at step {self.global_step}; "
                    "choose a lower optim.lr and name=, or let callbacks.bad_updates skip such updates"
                )
        elif self.bad_updates.is_bad(self, norm):
            if self._plateau:
                self._plateau.drop_update()
            optimizer.zero_grad(set_to_none=True)
            return
        if self.optim.variance_clip:
            clip_variance(optimizer, self.optim.variance_clip)

    @property
    def validates_in_full(self) -> bool:
        """Whether validation has all its metrics by now."""
        return True

    @property
    def product_dtype(self) -> torch.dtype:
        """The type that most matrix products of training have their factors in."""
        return torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else torch.float32

    def unscale_gradients(self) -> bool:
        """Bring complete gradients to their true size; False if this update must be skipped."""
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record that rebuilds the network, the run's options, how long it took and what its schedule knows."""
        checkpoint[RECORD_KEY] = self.record
        checkpoint[OPTIONS_KEY] = self.options
        checkpoint[SECONDS_KEY] = self.earlier_seconds + time.monotonic() - self._started
        if self._plateau:
            checkpoint[PLATEAU_KEY] = self._plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what earlier starts counted."""
        self.earlier_seconds = checkpoint[SECONDS_KEY]
        if self._plateau:
            self._plateau.load_state_dict(checkpoint[PLATEAU_KEY])

    def draw_pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """Pictures, by their names, of what the network does with validation samples; drawn after each validation."""
        return {}

    def sample_captions(self, batch: Batch) -> list[Image.Image]:
        """One picture for each caption, of networks that draw what captions say; after each validation too."""
        return []

    def sample_generators(self, n_samples: int, validation_batch: int | None = None) -> list[torch.Generator]:
        """Randomness of each sample of this batch: a function of the update and of the sample's place in it.

        So resuming needs no state, and the same samples get the same numbers on any number of devices, or in several
        batches whose gradients are added up. In validation the place is that in the data set.
        """
        rank, world = self.global_rank, 1 if self._trainer is None else self.trainer.world_size
        if validation_batch is None:
            first = (self.part * world + rank) * n_samples
            places: Iterable[int] = range(first, first + n_samples)
            seeds = [derive_seed(self.seed, self.global_step, place) for place in places]
        else:
            # All batches but the last are of this size; see `data.loader.validation_loader`.
            first = validation_batch * self.optim.batch_size
            places = (rank + world * number for number in range(first, first + n_samples))
            seeds = [derive_seed(self.seed, self.global_step, place, "val") for place in places]
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def log_means(
        self,
        split: str,
        values: Mapping[str, Tensor | float],
        n_samples: int,
        *,
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Log values of a batch as `split/name`: as means over the validation set, or over an update, over all ranks.

        Those of an update are logged when it is complete, and when a line of the log is due: to average them costs the
        ranks a message.

        Args:
            split: `train` or `val`.
            values: Each the mean over the samples of the batch.
            n_samples: How many these are.
            counts: Of values that are the mean over something else, over how many of it.
        """
        counts = counts or {}
        for name, value in values.items():
            count = counts.get(name, n_samples)
            if split == "train":
                given = torch.stack(
                    [torch.as_tensor(each, device=self.device).detach().float() for each in (value, count)]
                )
                given[0] *= given[1]
                self._sums[name] = self._sums.get(name, 0) + given
            else:
                self.log(
                    f"{split}/{name}",
                    value,
                    # Lightning averages weights over ranks in whole numbers: multiples of their number stay exact.
                    batch_size=int(count) * self.trainer.world_size,
                    on_step=False,
                    on_epoch=True,
                    sync_dist=True,
                )

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the means of the update that is about to be made."""
        sums, self._sums = self._sums, {}
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.global_step + 1) % every and "train/loss" in self.trainer.callback_metrics:
            return
        totals, counts = self._mean_over_ranks(torch.stack(list(sums.values()))).unbind(1)
        for name, mean in zip(sums, totals / counts.clamp(min=1e-9), strict=True):
            self.log(f"train/{name}", mean)
