"""The optimizer of every stage: AdamW, which weights decay, and the learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dalle1.models.options import check_field_types
from dalle1.training.schedules import warmup_cosine

LRSchedule = Literal["cosine", "plateau"]
DecayExclusions = Literal["vectors", "vectors_and_embeddings", "none"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Numbers of the optimizer. Steps are optimizer updates."""

    batch_size: int  # samples per device and update
    max_steps: int  # length of the run
    lr: float  # peak
    final_lr: float  # the last one, which lr_schedule ends at; equal to lr for a constant rate
    warmup_steps: int  # linear ramp from 0
    beta1: float  # of the running mean of gradients, in [0, 1)
    beta2: float  # of the running mean of squared gradients, in [0, 1)
    eps: float  # added to the root of that mean, > 0
    weight_decay: float  # decoupled; see decay_exclusions
    grad_clip_norm: float  # largest norm of the whole gradient; 0 means no clipping
    ema_decay: float  # of the average of the weights, per copy; 0 means no average
    ema_interval: int = 1  # updates from one copy into the average to the next
    # Weights that do not decay, which the paper does not name: biases, gains and other single `vectors`; embeddings
    # (tokens and positions) too; or `none`, so that all decay.
    decay_exclusions: DecayExclusions = "vectors"
    # Largest running mean of squared gradients that an update may use or keep (5 in the paper, app. B.2); 0 means any.
    variance_clip: float = 0.0
    # How the rate falls after the warm-up: `cosine` reaches final_lr at decay_steps and stays there; `plateau` halves
    # it whenever the training loss has stopped falling, see `plateau.PlateauHalving`.
    lr_schedule: LRSchedule = "cosine"
    decay_steps: int = 0  # cosine: 0 means max_steps
    plateau_window: int = 0  # updates whose mean loss is compared; the plateau_* are 0 for a cosine
    plateau_patience: int = 0  # windows without an improvement before the rate is halved
    plateau_threshold: float = 0.0  # a smaller improvement is none, as a share of the best window's loss

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("batch_size", "max_steps", "ema_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise ValueError(
                f"optim.warmup_steps must be in [0, max_steps = {self.max_steps}), got {self.warmup_steps}"
            )
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be a finite number > 0, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"optim.final_lr must be in [0, lr = {self.lr}], got {self.final_lr}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.ema_interval > 1 and not self.ema_decay:
            raise ValueError(
                f"optim.ema_interval must be 1 without an average, as ema_decay is 0, got {self.ema_interval}"
            )
        for name in ("weight_decay", "grad_clip_norm", "variance_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.variance_clip:
            # Of one squared gradient the first variance is (1 - beta2): it must need no clipping, see `clip_variance`.
            bound = math.sqrt(self.variance_clip / (1 - self.beta2))
            if not 0 < self.grad_clip_norm <= bound or not self.beta2:
                raise ValueError(
                    "optim.variance_clip needs beta2 > 0 and grad_clip_norm in (0, sqrt(variance_clip / (1 - beta2))] "
                    f"= (0, {bound:.4g}], got {self.beta2} and {self.grad_clip_norm}"
                )
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.decay_steps and not self.warmup_steps < self.decay_steps <= self.max_steps:
            raise ValueError(
                f"optim.decay_steps must be 0 or in (warmup_steps, max_steps] = ({self.warmup_steps}, "
                f"{self.max_steps}], got {self.decay_steps}"
            )
        if self.lr_schedule == "cosine":
            for name in ("plateau_window", "plateau_patience", "plateau_threshold"):
                if getattr(self, name):
                    raise ValueError(f"optim.{name} must be 0 with optim.lr_schedule=cosine, got {getattr(self, name)}")
            return
        for name in ("plateau_window", "plateau_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be >= 1 with optim.lr_schedule=plateau, got {getattr(self, name)}")
        if not 0 <= self.plateau_threshold < 1:
            raise ValueError(f"optim.plateau_threshold must be in [0, 1), got {self.plateau_threshold}")
        if self.final_lr == 0:
            raise ValueError(
                "optim.final_lr must be > 0 with optim.lr_schedule=plateau, got 0: halving never gets there"
            )
        if self.decay_steps:
            raise ValueError(
                f"optim.decay_steps must be 0 with optim.lr_schedule=plateau, got {self.decay_steps}: the loss decides"
            )

    def lr_factor(self, step: int) -> float:
        """Learning rate of update `step` (from 0) as a share of the peak; with `plateau` the warm-up alone."""
        final = self.final_lr if self.lr_schedule == "cosine" else self.lr
        steps = self.decay_steps or self.max_steps
        rate = warmup_cosine(step, peak=self.lr, final=final, warmup_steps=self.warmup_steps, steps=steps)
        return rate / self.lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable weights of `model`; those that `decay_exclusions` names do not decay."""
    decaying: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            (decaying if _decays(name, weight, config.decay_exclusions) else others).append(weight)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _decays(name: str, weight: Tensor, exclusions: DecayExclusions) -> bool:
    if exclusions == "none":
        return True
    is_embedding = "embedding" in name or name.endswith("positions")
    return weight.ndim > 1 and not (exclusions == "vectors_and_embeddings" and is_embedding)


@torch.no_grad()
def clip_variance(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Make the coming step of AdamW compute min(beta2 v + (1 - beta2) g^2, limit) as its running variance.

    The paper clips that value before it is used (app. B.2). The fused kernel computes and uses it in one go, so the old
    variance v is lowered instead, by as much as makes the new one `limit`, up to rounding. A weight's first step starts
    from v = 0: gradients must be so small that it needs no clipping, which `OptimConfig` sees to.
    """
    for group in optimizer.param_groups:
        beta2 = group["betas"][1]
        for weight in group["params"]:
            variance = optimizer.state.get(weight, {}).get("exp_avg_sq")
            if variance is not None and weight.grad is not None:
                highest = weight.grad.square().mul_((beta2 - 1) / beta2).add_(limit / beta2)
                torch.minimum(variance, highest, out=variance)
