"""Our transformer's training step on random tokens, as the benchmarks of its speed make it."""

from __future__ import annotations

from collections.abc import Callable

import hydra
import torch
from measure import configuration
from torch import Tensor

from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.training.optim import build_optimizer
from dalle1.training.transformer_module import TransformerOptimConfig


def random_tokens(config: TransformerConfig, batch: int) -> tuple[Tensor, Tensor]:
    """Captions that fill all text positions, and pictures."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, config.text_vocab_size, (batch, config.text_seq_len), generator=generator)
    return text, torch.randint(config.image_vocab_size, (batch, config.image_seq_len), generator=generator)


def make_step(model: DalleTransformer, batch: int) -> Callable[[], Tensor]:
    """One update as `stage=transformer` makes it, in bf16 on CUDA; without the average and the clipped variance.

    It returns the loss, which on CUDA may still be on its way.
    """
    device = model.start.device
    text, image = (tokens.to(device) for tokens in random_tokens(model.config, batch))
    text_weights = torch.full(text.shape, 1 / 8 / text.numel(), device=device)
    image_weights = torch.full(image.shape, 7 / 8 / image.numel(), device=device)
    optim = hydra.utils.instantiate(configuration("stage=transformer", "experiment=paper").optim)
    assert isinstance(optim, TransformerOptimConfig)
    optimizer, weights = build_optimizer(model, optim), list(model.parameters())

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = model.losses(text, image, text_weights=text_weights, image_weights=image_weights)
        torch.autograd.backward(losses.loss)
        torch.nn.utils.clip_grad_norm_(weights, optim.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return losses.loss.detach()

    return step
