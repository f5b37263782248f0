"""Memory, communication and time of training: closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stage_runs import last

from dalle1.checkpoint import read_checkpoint
from dalle1.models.accounting import count_activations, count_flops, count_head_scratch, count_weights
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.training.cost import (
    Hardware,
    Training,
    count_communication,
    count_memory,
    count_seconds,
    largest_batch,
)

MODEL = TransformerConfig(
    text_vocab_size=30,
    image_vocab_size=20,
    text_seq_len=8,
    grid_height=4,
    grid_width=5,
    n_layers=3,
    n_heads=2,
    d_model=16,
    conv_kernel_size=3,
)


@pytest.fixture
def training() -> Training:
    with torch.device("meta"):
        weights = count_weights(DalleTransformer(MODEL))
    return Training(
        model=MODEL,
        weights=weights,
        devices=4,
        batch_size=6,
        passes=2,
        backend="flex",
        mixed=True,
        has_average=True,
        handed_bytes=4 * weights.total,
        kept_bytes=0,
    )


def test_ddp_keeps_everything_on_every_device(training: Training) -> None:
    memory = count_memory(training, sharded=False, recompute=False)
    size = 4 * training.weights.total
    assert (memory.weights, memory.gradients, memory.buckets) == (size, size, size)
    assert (memory.moments, memory.average, memory.gathered_weights) == (2 * size, size, 0)
    assert memory.activations == count_activations(MODEL, 6, backend="flex", mixed=True, recompute=False).total
    assert memory.logits == count_head_scratch(MODEL, 6, "cuda")
    assert memory.total == 6 * size + memory.activations + memory.logits


def test_one_device_sends_nothing_and_makes_no_copies_to_send(training: Training) -> None:
    alone = replace(training, devices=1)
    assert count_memory(alone, sharded=False, recompute=True).buckets == 0
    assert count_communication(alone, sharded=False) == 0


def test_without_an_average_it_needs_no_memory(training: Training) -> None:
    assert count_memory(replace(training, has_average=False), sharded=False, recompute=False).average == 0


@pytest.mark.parametrize(("mixed", "element"), [(True, 2), (False, 4)])
def test_fsdp_keeps_a_share_and_gathers_two_blocks(training: Training, mixed: bool, element: int) -> None:
    training = replace(training, mixed=mixed)
    memory = count_memory(training, sharded=True, recompute=True)
    weights = training.weights
    share, block, ends = weights.total, weights.blocks // 3, weights.embeddings + weights.heads
    assert (memory.weights, memory.moments, memory.average, memory.buckets) == (share, 2 * share, share, 0)
    assert memory.gathered_weights == element * 2 * block + 4 * ends
    assert memory.gradients == share + 4 * (block + ends)
    kept = count_activations(MODEL, 6, backend="flex", mixed=mixed, recompute=True)
    # The gathered weights are in the type of the products already.
    assert memory.activations == kept.total - kept.weight_copies


def test_share_is_rounded_up(training: Training) -> None:
    odd = replace(training, devices=7, weights=replace(training.weights, heads=1))
    assert odd.weights.total % 7
    assert count_memory(odd, sharded=True, recompute=True).weights == 4 * odd.weights.total // 7 + 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_largest_batch_fits_and_one_more_does_not(training: Training, sharded: bool, recompute: bool) -> None:
    largest = largest_batch(training, 0.02, sharded=sharded, recompute=recompute)
    at, above = (
        count_memory(replace(training, batch_size=size), sharded=sharded, recompute=recompute).total
        for size in (largest, largest + 1)
    )
    assert at <= 0.02e9 < above
    assert largest_batch(training, 1e-6, sharded=sharded, recompute=recompute) == 0


def test_ddp_sends_gradients_once_an_update_and_fsdp_weights_and_gradients_in_every_pass(training: Training) -> None:
    weights, blocks = training.weights.total, training.weights.blocks
    ends = weights - blocks
    assert count_communication(training, sharded=False) == 2 * 4 * weights * 3 // 4
    mixed = (2 + 2) * blocks + 4 * ends + 4 * weights
    assert count_communication(training, sharded=True) == 2 * mixed * 3 // 4
    full = (4 + 4) * blocks + 4 * ends + 4 * weights
    assert count_communication(replace(training, mixed=False), sharded=True) == 2 * full * 3 // 4


def test_sending_less_is_cheaper_for_ddp_and_what_it_keeps_takes_memory(training: Training) -> None:
    less = replace(training, handed_bytes=1000, kept_bytes=700)
    assert count_communication(less, sharded=False) == 2 * 1000 * 3 // 4
    assert count_memory(less, sharded=False, recompute=True).unsent == 700
    for way in ({"sharded": True}, {"sharded": False}):
        alone = replace(less, devices=1) if not way["sharded"] else less
        assert count_memory(alone, recompute=True, **way).unsent == 0


def test_time_is_operations_by_what_devices_do(training: Training) -> None:
    assert training.global_batch == 4 * 6 * 2
    assert training.flops_per_sample == 3 * count_flops(MODEL).total
    hardware = Hardware(gpu_gigabytes=80, teraflops=2.0, mfu=0.25)
    assert count_seconds(training, hardware, 1000) == pytest.approx(1000 * training.flops_per_sample / (4 * 0.5e12))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mfu": 0.0}, r"plan.mfu must be in \(0, 1\], got 0.0"),
        ({"mfu": 40}, r"plan.mfu must be in \(0, 1\], got 40"),
        ({"teraflops": 0}, "plan.teraflops must be a finite number > 0, got 0"),
        ({"gpu_gigabytes": -80}, "plan.gpu_gigabytes must be a finite number > 0, got -80"),
    ],
)
def test_impossible_hardware_is_refused(option: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hardware(**{"gpu_gigabytes": 80.0, "teraflops": 989.0, "mfu": 0.4, **option})


def test_checkpoint_has_sixteen_bytes_for_each_weight(trained: Path) -> None:
    content = read_checkpoint(last(trained, "transformer"))
    moments = [
        state[name] for state in content["optimizer_states"][0]["state"].values() for name in ("exp_avg", "exp_avg_sq")
    ]
    tensors = [*content["state_dict"].values(), *content["ema"].values(), *moments]
    weights = sum(weight.numel() for weight in content["ema"].values())
    assert sum(each.numel() * each.element_size() for each in tensors) == 16 * weights
