"""Stage 1: the dVAE learns to reconstruct pictures through a grid of codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dalle1.data.dataset import Batch
from dalle1.evaluation.pictures import image_grid
from dalle1.losses import logit_laplace_nll, negative_elbo
from dalle1.models.dvae import DVAE
from dalle1.models.pixels import map_pixels
from dalle1.training.codebook_start import check_feature_width, start_codebook
from dalle1.training.optim import OptimConfig
from dalle1.training.schedules import cosine
from dalle1.training.stage_module import StageModule


@dataclass(frozen=True, kw_only=True)
class DVAEOptimConfig(OptimConfig):
    """How a dVAE is trained. Schedules are cosines over the first so many updates (paper, app. A.2)."""

    kl_weight: float = 6.6  # beta at the end of its ramp from 0
    kl_weight_steps: int = 5_000
    temperature_start: float = 1.0  # of the relaxation
    temperature_end: float = 1 / 16
    temperature_steps: int = 150_000
    # Floor on ln b of the likelihood, see `losses.logit_laplace_nll`; -inf is the paper.
    min_log_scale: float = -math.inf
    # Update at which the codebook is started from the encoder's features (see `codebook_start`); until then
    # the dVAE is a plain autoencoder. 0 is the paper: random codes from the first update.
    codebook_start_step: int = 0
    codebook_start_pictures: int = 512
    codebook_sharpness: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight < 0:
            raise ValueError(f"optim.kl_weight must be >= 0, got {self.kl_weight}")
        for name in ("temperature_start", "temperature_end", "codebook_sharpness"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name} must be > 0, got {getattr(self, name)}")
        for name in ("kl_weight_steps", "temperature_steps", "codebook_start_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must be >= 0, got {getattr(self, name)}")
        if self.codebook_start_step >= self.max_steps:
            raise ValueError(
                f"optim.codebook_start_step must be < max_steps = {self.max_steps}, got {self.codebook_start_step}: "
                "before it there are no codes; 0 starts with random ones"
            )
        if self.codebook_start_pictures < 1:
            raise ValueError(f"optim.codebook_start_pictures must be >= 1, got {self.codebook_start_pictures}")

    def temperature(self, step: int) -> float:
        """Temperature of the relaxation at update `step`."""
        return cosine(step, start=self.temperature_start, end=self.temperature_end, steps=self.temperature_steps)

    def kl_weight_at(self, step: int) -> float:
        """Weight of the KL term at update `step`."""
        return cosine(step, start=0.0, end=self.kl_weight, steps=self.kl_weight_steps)


class DVAEModule(StageModule):
    """Trains a `DVAE` on the relaxed evidence bound; validates it on what stage 2 will use, argmax codes."""

    model: DVAE
    optim: DVAEOptimConfig

    def __init__(self, model: DVAE, optim: DVAEOptimConfig, *, seed: int) -> None:
        """Train `model`. Raises: ValueError if its codebook cannot be started as `optim` asks."""
        super().__init__(model, optim, seed=seed)
        if optim.codebook_start_step:
            check_feature_width(model)
        self._code_counts = torch.zeros(model.config.vocab_size, dtype=torch.int64)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the codebook when its step has come."""
        if self.optim.codebook_start_step and self.global_step == self.optim.codebook_start_step:
            loader = self.trainer.train_dataloader
            assert loader is not None, "a training batch has come from it"
            dataset = loader.dataset
            count = min(self.optim.codebook_start_pictures, len(dataset))
            # Spread over the whole set; the same on every rank.
            picked = [dataset[i * len(dataset) // count]["pixels"] for i in range(count)]
            image = torch.stack(picked).to(self.device).float() / 255
            generator = torch.Generator().manual_seed(self.seed)
            start_codebook(self.model, image, sharpness=self.optim.codebook_sharpness, generator=generator)
            # Rounding may differ between devices, and k-means amplifies it.
            for weight in (*self.model.encoder.head.parameters(), self.model.codebook):
                weight.data.copy_(self.trainer.strategy.broadcast(weight.data))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Negative relaxed evidence bound of one batch, in nats per pixel value."""
        image, step = batch["image"], self.global_step
        if step < self.optim.codebook_start_step:
            parameters = self.model.decode_vectors(self.model.features(image))
            # DDP wants a gradient of every weight, be it zero.
            idle = (*self.model.encoder.head.parameters(), self.model.codebook)
            kl = 0.0 * torch.stack([weight.sum() for weight in idle]).sum().expand(len(image), 1, 1)
        else:
            parameters, kl = self.model.relaxed(
                image, temperature=self.optim.temperature(step), generator=self.step_generator()
            )
        nll = logit_laplace_nll(map_pixels(image), parameters, min_log_scale=self.optim.min_log_scale)
        loss = negative_elbo(nll, kl, kl_weight=self.optim.kl_weight_at(step))
        values: dict[str, Tensor | float] = {
            "loss": loss,
            "nats_per_dim": nll.mean(),
            "kl_per_position": kl.mean(),
            "temperature": self.optim.temperature(step),
            "kl_weight": self.optim.kl_weight_at(step),
        }
        self.log_means("train", values, len(image))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Count codes from zero."""
        self._code_counts.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the error of hard reconstructions and count the codes they use."""
        image = batch["image"]
        tokens = self.model.encode(image)
        error = (self.model.decode(tokens) - image).square().mean(dim=(1, 2, 3))
        psnr = -10 * error.clamp(min=1e-10).log10()  # pixels are in [0, 1], so the peak is 1
        self.log_means("val", {"psnr_db": psnr.mean(), "mse": error.mean()}, len(image))
        self._code_counts += torch.bincount(tokens.flatten().cpu(), minlength=len(self._code_counts))

    def on_validation_epoch_end(self) -> None:
        """Log how the whole validation set uses the codebook, over all ranks."""
        counts = self.trainer.strategy.reduce(self._code_counts.to(self.device), reduce_op="sum").cpu()
        probs = counts.double() / counts.sum()
        entropy = -(probs * probs.clamp(min=1e-300).log()).sum()
        self.log("val/codes_used_share", (counts > 0).float().mean(), sync_dist=True)
        self.log("val/code_perplexity", entropy.exp().float(), sync_dist=True)

    @torch.no_grad()
    def draw_samples(self, batch: Batch) -> Image.Image:
        """Pictures above their reconstructions from argmax codes."""
        image = batch["image"].to(self.device)
        return image_grid(torch.cat([image, self.model.decode(self.model.encode(image))]), columns=len(image))
