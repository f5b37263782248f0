"""The CLIP that ranks samples: it learns which caption belongs to which picture."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.data.preparation import Batch
from dalle1.data.transforms import to_unit_interval
from dalle1.losses import contrastive_loss
from dalle1.models.clip import CLIP
from dalle1.training.stage_module import StageModule


class CLIPModule(StageModule):
    """Trains a `CLIP` on captioned pictures; every caption of the global batch is a negative for the others."""

    model: CLIP

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `StageModule`."""
        super().__init__(*args, **kwargs)
        self._seen: list[Tensor] = []  # (2, b, d): features of the pictures and captions of this validation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Contrastive loss of one global batch."""
        image, text = (self._of_all_ranks(features) for features in self._encode(batch))
        values = self._compare(image, text)
        self.log_means("train", values, len(image))
        return values["loss"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, and limit the temperature before anything averages or saves it."""
        super().optimizer_step(*args, **kwargs)
        self.model.limit_scale()

    def on_validation_epoch_start(self) -> None:
        """Forget those of a validation that was interrupted."""
        self._seen = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the features: what they are compared with may be on another rank."""
        self._seen.append(torch.stack(self._encode(batch)).float())

    def on_validation_epoch_end(self) -> None:
        """Log the means over groups as large as a global batch, which are the same on any number of ranks."""
        image, text = self._whole_set(torch.cat(self._seen, dim=1))
        group = self.optim.batch_size * self.trainer.world_size
        n_samples = torch.tensor([len(part) for part in image.split(group)], device=self.device)
        parts = [self._compare(*pair) for pair in zip(image.split(group), text.split(group), strict=True)]
        for name in parts[0]:
            values = torch.stack([part[name] for part in parts])
            # The same on all ranks; Lightning wants to be told.
            self.log(f"val/{name}", (values * n_samples).sum() / n_samples.sum(), sync_dist=True)

    def _encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image = self.model.encode_image(to_unit_interval(batch["pixels"]))
        return image, self.model.encode_text(batch["text_tokens"])

    def _compare(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        scale = self.model.logit_scale
        right = (image @ text.t()).argmax(1) == torch.arange(len(image), device=image.device)
        return {
            "loss": contrastive_loss(image, text, scale),
            "caption_accuracy": right.float().mean(),  # share of pictures whose own caption is the nearest
            "logit_scale": scale.detach(),
        }

    def _of_all_ranks(self, features: Tensor) -> Tensor:
        """Features of all ranks, which have as many each, with their gradient."""
        if self.trainer.world_size == 1:
            return features
        gathered = self.all_gather(features, sync_grads=True)
        assert isinstance(gathered, Tensor), "one tensor in, one tensor out"
        return gathered.flatten(0, 1)

    def _whole_set(self, features: Tensor) -> Tensor:
        """Features (2, n, d) of all ranks in the order of the validation set; ranks may have one sample less."""
        if self.trainer.world_size == 1:
            return features
        counts = self.all_gather(torch.tensor(features.shape[1], device=self.device))
        assert isinstance(counts, Tensor), "one tensor in, one tensor out"
        longest = int(counts.max())
        gathered = self.all_gather(F.pad(features, (0, 0, 0, longest - features.shape[1])))  # (ranks, 2, n, d)
        assert isinstance(gathered, Tensor), "one tensor in, one tensor out"
        # Sample i of the set is the (i // ranks)th of rank i % ranks.
        is_there = torch.arange(longest, device=self.device)[:, None] < counts
        return gathered.permute(1, 2, 0, 3)[:, is_there]
