"""The order of the samples: complete, never repeated, and the same on any number of devices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle1.data.order import batch_indices, batches_per_epoch, epoch_order

seeds = st.integers(0, 2**40)
sizes = st.integers(1, 5)


@given(seed=seeds, epoch=st.integers(0, 1000), n_samples=st.integers(1, 50))
@settings(deadline=None, max_examples=30)
def test_epoch_order_is_a_permutation(seed: int, epoch: int, n_samples: int) -> None:
    assert sorted(epoch_order(seed, epoch, n_samples).tolist()) == list(range(n_samples))


def test_epoch_order_differs_between_epochs_and_seeds() -> None:
    orders = {tuple(epoch_order(seed, epoch, 20).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_epoch_order_cannot_be_changed_by_its_user() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 4)[0] = 9


@given(seed=seeds, epoch=st.integers(0, 3), batch_size=sizes, world_size=sizes, extra=st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_an_epoch_shows_no_sample_twice_over_all_ranks(
    seed: int, epoch: int, batch_size: int, world_size: int, extra: int
) -> None:
    n_samples = batch_size * world_size + extra
    n_batches = batches_per_epoch(n_samples, batch_size=batch_size, world_size=world_size)
    seen = [
        batch_indices(seed, step, n_samples=n_samples, batch_size=batch_size, rank=rank, world_size=world_size)
        for step in range(epoch * n_batches, (epoch + 1) * n_batches)
        for rank in range(world_size)
    ]
    assert {len(batch) for batch in seen} == {batch_size}
    ids = np.concatenate(seen)
    assert len(set(ids.tolist())) == len(ids) == n_batches * batch_size * world_size
    assert n_samples - len(ids) < batch_size * world_size


@given(seed=seeds, step=st.integers(0, 50), batch_size=sizes, world_size=sizes)
@settings(deadline=None, max_examples=30)
def test_ranks_joined_are_the_batch_of_one_device(seed: int, step: int, batch_size: int, world_size: int) -> None:
    ranks = [
        batch_indices(seed, step, n_samples=60, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    alone = batch_indices(seed, step, n_samples=60, batch_size=batch_size * world_size)
    assert np.concatenate(ranks).tolist() == alone.tolist()


def test_samples_left_out_differ_between_epochs() -> None:
    left_out = {
        tuple({*range(10)} - {*batch_indices(0, step, n_samples=10, batch_size=8).tolist()}) for step in range(10)
    }
    assert len(left_out) > 1


def test_data_set_smaller_than_a_global_batch_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"batch of 12 samples \(4 per device on 3 device\(s\)\), got 11; lower data.batch"
    ):
        batches_per_epoch(11, batch_size=4, world_size=3)
