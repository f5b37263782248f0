"""The optimizer of every stage: AdamW with a warm-up and a cosine, and which weights decay."""

from dataclasses import dataclass

import torch
from torch import nn

from dalle1.models.options import check_field_types
from dalle1.training.schedules import warmup_cosine


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Numbers of the optimizer. Steps are optimizer updates."""

    batch_size: int  # samples per device and update
    max_steps: int  # length of the run
    lr: float  # peak
    final_lr: float  # at decay_steps and after, by a cosine from the peak; equal to lr for a constant rate
    warmup_steps: int  # linear ramp from 0
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # decoupled; on matrices and kernels only, never on biases, gains and single vectors
    grad_clip_norm: float  # largest norm of the whole gradient; 0 means no clipping
    ema_decay: float  # of the average of the weights, per step; 0 means no average
    decay_steps: int = 0  # step at which final_lr is reached; 0 means max_steps

    def __post_init__(self) -> None:
        check_field_types(self)
        for name in ("batch_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps < self.max_steps:
            raise ValueError(
                f"optim.warmup_steps must be in [0, max_steps = {self.max_steps}), got {self.warmup_steps}"
            )
        if self.decay_steps and not self.warmup_steps < self.decay_steps <= self.max_steps:
            raise ValueError(
                f"optim.decay_steps must be 0 or in (warmup_steps, max_steps] = ({self.warmup_steps}, "
                f"{self.max_steps}], got {self.decay_steps}"
            )
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optim.{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"optim.final_lr must be in [0, lr = {self.lr}], got {self.final_lr}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must be >= 0, got {getattr(self, name)}")

    def lr_factor(self, step: int) -> float:
        """Learning rate of update `step` (from 0) as a share of the peak."""
        steps = self.decay_steps or self.max_steps
        rate = warmup_cosine(step, peak=self.lr, final=self.final_lr, warmup_steps=self.warmup_steps, steps=steps)
        return rate / self.lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable weights of `model`; matrices and kernels decay, vectors and scalars do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
