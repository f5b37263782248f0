"""The CLIP that ranks samples: it learns which caption belongs to which picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle1.data.preparation import Batch
from dalle1.data.transforms import to_unit_interval
from dalle1.losses import contrastive_loss
from dalle1.models.clip import CLIP
from dalle1.training.stage_module import StageModule


class CLIPModule(StageModule):
    """Trains a `CLIP` on captioned pictures; every caption of the global batch is a negative for the others."""

    model: CLIP

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Contrastive loss of one global batch."""
        return self._step("train", batch)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Limit the temperature."""
        self.model.limit_scale()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the same for the validation set."""
        self._step("val", batch)

    def _step(self, split: str, batch: Batch) -> Tensor:
        image = self._gather(self.model.encode_image(to_unit_interval(batch["pixels"])), split)
        text = self._gather(self.model.encode_text(batch["text_tokens"]), split)
        scale = self.model.logit_scale
        loss = contrastive_loss(image, text, scale)
        right = (image @ text.t()).argmax(1) == torch.arange(len(image), device=image.device)
        values: dict[str, Tensor | float] = {
            "loss": loss,
            "caption_accuracy": right.float().mean(),  # share of pictures whose own caption is the nearest
            "logit_scale": scale.detach(),
        }
        self.log_means(split, values, len(batch["pixels"]))
        return loss

    def _gather(self, features: Tensor, split: str) -> Tensor:
        """Features of all ranks, with their gradient; validation compares within a rank, as batches may differ."""
        if self.trainer.world_size == 1 or split != "train":
            return features
        gathered = self.all_gather(features, sync_grads=True)
        assert isinstance(gathered, Tensor), "one tensor in, one tensor out"
        return gathered.flatten(0, 1)
