"""Which weights decay."""

from __future__ import annotations

import torch

from dalle1.training.optim import OptimConfig, build_optimizer


def test_matrices_decay_and_vectors_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)
    config = OptimConfig(
        batch_size=1,
        max_steps=10,
        lr=1e-3,
        final_lr=1e-4,
        warmup_steps=1,
        beta1=0.8,
        beta2=0.95,
        eps=1e-9,
        weight_decay=0.3,
        grad_clip_norm=1.0,
        ema_decay=0.0,
    )
    optimizer = build_optimizer(model, config)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay_of[id(model[0].weight)] == 0.3
    assert id(model[1].weight) not in decay_of, "frozen"
    for vector in (model[0].bias, model[1].bias, model[2].weight, model[2].bias):
        assert decay_of[id(vector)] == 0
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.95), 1e-9)
