"""Which weights decay, and what bounds the variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dalle1.models.clip import CLIP
from dalle1.models.transformer import DalleTransformer
from dalle1.training.optim import OptimConfig, build_optimizer, clip_variance


def decayed(model: torch.nn.Module, config: OptimConfig) -> dict[str, float]:
    """The decay of each weight that is trained."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    return {names[id(weight)]: group["weight_decay"] for group in groups for weight in group["params"]}


def test_matrices_decay_and_vectors_do_not(optim_numbers: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    model[1].weight.requires_grad_(False)
    config = OptimConfig(**(optim_numbers | {"beta1": 0.8, "beta2": 0.95, "eps": 1e-9, "weight_decay": 0.3}))
    assert decayed(model, config) == {"0.weight": 0.3, "0.bias": 0, "1.bias": 0, "2.weight": 0, "2.bias": 0}
    for group in build_optimizer(model, config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.95), 1e-9)


def test_choice_of_weights_that_do_not_decay(
    optim_numbers: dict[str, Any],
    make_transformer: Callable[..., DalleTransformer],
    make_clip: Callable[..., CLIP],
) -> None:
    embeddings = {
        *("text_embedding.weight", "text_position_embedding.weight", "image_embedding.weight"),
        *("row_embedding.weight", "column_embedding.weight"),
    }
    transformer = make_transformer().requires_grad_(True)
    rest = {name for name, weight in transformer.named_parameters() if weight.ndim > 1} - embeddings
    for exclusions, expected in {
        "vectors": rest | embeddings,
        "vectors_and_embeddings": rest,
        "none": dict(transformer.named_parameters()).keys(),
    }.items():
        config = OptimConfig(**(optim_numbers | {"weight_decay": 0.1, "decay_exclusions": exclusions}))
        assert {name for name, decay in decayed(transformer, config).items() if decay} == expected


def test_positions_are_embeddings_too(optim_numbers: dict[str, Any], make_clip: Callable[..., CLIP]) -> None:
    clip = make_clip().requires_grad_(True)
    config = OptimConfig(**(optim_numbers | {"weight_decay": 0.1, "decay_exclusions": "vectors_and_embeddings"}))
    matrices = {name for name, weight in clip.named_parameters() if weight.ndim > 1}
    kept = {name for name, decay in decayed(clip, config).items() if not decay} & matrices
    assert kept == {"image_tower.positions", "text_tower.positions", "text_tower.embedding.weight"}


def test_clipped_variance_is_the_papers(optim_numbers: dict[str, Any]) -> None:
    # Independent reference: Adam written out, its variance clipped before it is used, in fp64.
    numbers = {"beta2": 0.9, "grad_clip_norm": 2.0, "variance_clip": 0.5, "lr": 0.1, "beta1": 0.5}
    config = OptimConfig(**(optim_numbers | numbers))
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = build_optimizer(torch.nn.ParameterList([weight]), config)
    expected, mean, variance = torch.zeros(3, dtype=torch.float64), 0.0, 0.0
    clipped = 0
    for step in range(1, 30):
        # The first stays below the limit, the second goes above it at times, the third for good.
        weight.grad = torch.tensor([0.3, 1.5 * (step % 5 == 0), 1.2], dtype=torch.float64)
        mean = 0.5 * mean + 0.5 * weight.grad
        variance = 0.9 * variance + 0.1 * weight.grad**2
        clipped += int((variance > 0.5).sum())
        variance = variance.clamp(max=0.5)
        expected -= 0.1 * (mean / (1 - 0.5**step)) / ((variance / (1 - 0.9**step)).sqrt() + 1e-8)
        clip_variance(optimizer, config.variance_clip)
        optimizer.step()
        torch.testing.assert_close(weight.data, expected)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], variance)
    assert clipped > 10


def test_variance_is_clipped_only_where_its_first_value_is_within_the_limit(optim_numbers: dict[str, Any]) -> None:
    paper = optim_numbers | {"beta2": 0.96, "variance_clip": 5.0}
    OptimConfig(**(paper | {"grad_clip_norm": 4.0}))
    for norm in (0.0, 12.0):
        with pytest.raises(ValueError, match=rf"grad_clip_norm in \(0, .*\] = \(0, 11.18\], got 0.96 and {norm}"):
            OptimConfig(**(paper | {"grad_clip_norm": norm}))
