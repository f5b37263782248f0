"""Stage 1: the dVAE learns to reconstruct pictures through a grid of codes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle1.data.preparation import Batch
from dalle1.data.transforms import to_unit_interval
from dalle1.evaluation.codebook_usage import codebook_usage, collapse_alarm
from dalle1.evaluation.image_quality import SSIM_SMALLEST_SIDE, psnr_db, squared_error, ssim
from dalle1.evaluation.pictures import draw_code_use, to_pictures, token_maps
from dalle1.losses import logit_laplace_nll, negative_elbo
from dalle1.models.dvae import DVAE, reconstruction
from dalle1.models.pixels import map_pixels
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.training.codebook_start import check_feature_width, start_codebook
from dalle1.training.optim import OptimConfig
from dalle1.training.schedules import cosine
from dalle1.training.stage_module import StageModule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DVAEOptimConfig(OptimConfig):
    """How a dVAE is trained. Schedules are cosines over the first so many updates (paper, app. A.2)."""

    kl_weight: float = 6.6  # beta at the end of its ramp from 0
    kl_weight_steps: int = 5_000  # updates of that ramp
    temperature_start: float = 1.0  # of the relaxation
    temperature_end: float = 1 / 16  # which it has reached after temperature_steps, and keeps
    temperature_steps: int = 150_000  # updates from the one to the other
    # Floor on ln b of the likelihood, see `losses.logit_laplace_nll`; -inf is the paper.
    min_log_scale: float = -math.inf
    # Update at which the codebook is started from the encoder's features (see `codebook_start`); until then
    # the dVAE is a plain autoencoder. 0 is the paper: random codes from the first update.
    codebook_start_step: int = 0
    codebook_start_pictures: int = 512  # training pictures whose features k-means sees then
    # By how much a logit falls then, at the mean distance of a feature to its code.
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
        self._started_codebook = False
        self._code_counts = torch.zeros(model.config.vocab_size, dtype=torch.int64)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the codebook when its step has come."""
        start = self.optim.codebook_start_step
        if not start or self.global_step != start or self._started_codebook:
            return
        self._started_codebook = True  # further batches may be part of the same update
        if self.bad_updates is not None:
            self.bad_updates.forget_losses()
        loader = self.trainer.train_dataloader
        assert loader is not None, "a training batch has come from it"
        # The same on every rank.
        picked = [sample["pixels"] for sample in loader.spread_samples(self.optim.codebook_start_pictures)]
        image = to_unit_interval(torch.stack(picked).to(self.device))
        generator = torch.Generator().manual_seed(self.seed)
        start_codebook(self.model, image, sharpness=self.optim.codebook_sharpness, generator=generator)
        # Rounding may differ between devices, and k-means amplifies it.
        self.fresh_weights |= {"encoder.head.weight", "encoder.head.bias", "codebook"}
        for name in sorted(self.fresh_weights):
            weight = self.model.get_parameter(name).data
            weight.copy_(self.trainer.strategy.broadcast(weight))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Negative relaxed evidence bound of one batch, in nats per pixel value."""
        image, step = to_unit_interval(batch["pixels"]), self.global_step
        if step < self.optim.codebook_start_step:
            parameters = self.model.decode_vectors(self.model.features(image))
            # DDP wants a gradient of every weight, be it zero.
            idle = (*self.model.encoder.head.parameters(), self.model.codebook)
            kl = 0.0 * torch.stack([weight.sum() for weight in idle]).sum().expand(len(image), 1, 1)
        else:
            parameters, kl = self.model.relaxed(
                image, temperature=self.optim.temperature(step), generator=self.sample_generators(len(image))
            )
        nll = logit_laplace_nll(map_pixels(image), parameters, min_log_scale=self.optim.min_log_scale)
        loss = negative_elbo(nll, kl, kl_weight=self.optim.kl_weight_at(step))
        values: dict[str, Tensor | float] = {
            "loss": loss,
            "relaxed_nats_per_dim": nll.mean(),
            "kl_per_position": kl.mean(),
            "temperature": self.optim.temperature(step),
            "kl_weight": self.optim.kl_weight_at(step),
        }
        self.log_means("train", values, len(image))
        return loss

    @property
    def _has_codes(self) -> bool:
        """Whether the network that is validated has its codebook; without, it is a plain autoencoder."""
        start = self.optim.codebook_start_step
        return start == 0 or self.global_step > start

    @property
    def validates_in_full(self) -> bool:
        """Whether validation has all its metrics by now: most are of codes."""
        return self._has_codes

    def on_validation_epoch_start(self) -> None:
        """Count codes from zero."""
        self._code_counts.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log what hard and relaxed codes lose, and count the hard ones; without codes, what the autoencoder loses."""
        image = to_unit_interval(batch["pixels"])
        if not self._has_codes:
            parameters = self.model.decode_vectors(self.model.features(image))
            losses = _losses(image, parameters, self._nll(image, parameters), prefix="autoencoder_")
            self.log_means("val", losses, len(image))
            return
        tokens = self.model.encode(image)
        hard = self._decode_hard(tokens)
        temperature, kl_weight = self.optim.temperature(self.global_step), self.optim.kl_weight_at(self.global_step)
        noise = self.sample_generators(len(image), batch_idx)
        relaxed, kl = self.model.relaxed(image, temperature=temperature, generator=noise)
        nll = self._nll(image, relaxed)
        values = _losses(image, hard, self._nll(image, hard)) | _losses(image, relaxed, nll, prefix="relaxed_")
        if min(image.shape[-2:]) >= SSIM_SMALLEST_SIDE:
            values["ssim"] = ssim(reconstruction(hard), image).mean()
        values |= {
            "loss": negative_elbo(nll, kl, kl_weight=kl_weight),
            "negative_elbo": negative_elbo(nll, kl, kl_weight=1.0),
            "kl_per_position": kl.mean(),
            "temperature": temperature,
            "kl_weight": kl_weight,
        }
        self.log_means("val", values, len(image))
        self._code_counts += torch.bincount(tokens.flatten().cpu(), minlength=len(self._code_counts))

    def on_validation_epoch_end(self) -> None:
        """Log how the whole validation set uses the codebook, over all ranks, and sound the alarm if it does not."""
        if not self._has_codes:
            return
        self._code_counts.copy_(self.trainer.strategy.reduce(self._code_counts.to(self.device), reduce_op="sum"))
        usage = codebook_usage(self._code_counts)
        for name, value in (
            ("codes_used_share", usage.used_share),
            ("code_perplexity", usage.perplexity),
            ("dead_codes", usage.n_dead),
        ):
            self.log(f"val/{name}", float(value), sync_dist=True)
        self.alarm = collapse_alarm(usage)
        if self.alarm and self.trainer.is_global_zero:
            logger.warning("step %d: %s", self.global_step, self.alarm)

    @torch.no_grad()
    def draw_pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """Pictures above what relaxed and hard codes make of them and the codes; how the validation set uses codes."""
        image = to_unit_interval(batch["pixels"].to(self.device))
        if not self._has_codes:
            title = f"autoencoder: codes begin after step {self.optim.codebook_start_step}"
            seen = reconstruction(self.model.decode_vectors(self.model.features(image)))
            return {"reconstructions": _rows({"original": to_pictures(image), title: to_pictures(seen)})}
        tokens = self.model.encode(image)
        # The same noise after every update: what changes between two pictures is the network.
        noise = torch.Generator(self.device).manual_seed(self.seed)
        temperature = self.optim.temperature(self.global_step)
        relaxed, _ = self.model.relaxed(image, temperature=temperature, generator=noise)
        rows = {
            "original": to_pictures(image),
            f"relaxed, at temperature {temperature:.3g}": to_pictures(reconstruction(relaxed)),
            "hard": to_pictures(reconstruction(self._decode_hard(tokens))),
            "tokens": token_maps(tokens, pixels_per_token=self.model.config.downsampling),
        }
        title = f"step {self.global_step}: {codebook_usage(self._code_counts)}"
        return {"reconstructions": _rows(rows), "code_use": draw_code_use(self._code_counts, title)}

    def _decode_hard(self, tokens: Tensor) -> Tensor:
        return self.model.decode_vectors(F.embedding(tokens, self.model.codebook))

    def _nll(self, image: Tensor, parameters: Tensor) -> Tensor:
        return logit_laplace_nll(map_pixels(image), parameters, min_log_scale=self.optim.min_log_scale)


def _losses(image: Tensor, parameters: Tensor, nll: Tensor, *, prefix: str = "") -> dict[str, Tensor | float]:
    """What a reconstruction loses, as likelihood and as error: means over a batch."""
    error = squared_error(reconstruction(parameters), image)
    return {
        f"{prefix}nats_per_dim": nll.mean(),
        f"{prefix}mse": error.mean(),
        f"{prefix}psnr_db": psnr_db(error).mean(),
    }


def _rows(pictures: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows of pictures below their names."""
    return draw_page([GridBlock(title=name, pictures=row, columns=len(row)) for name, row in pictures.items()])
