"""Which samples come when."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle1.data.order import SampleOrder, batches_per_epoch

BLOCKS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def ids_of(order: SampleOrder, start: int, stop: int) -> list[int]:
    return order.take(start, stop)[0].tolist()


@given(blocks=BLOCKS, window=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_every_epoch_has_each_sample_once(blocks: list[int], window: int, seed: int, epoch: int) -> None:
    order = SampleOrder(blocks, seed=seed, window=window)
    n = sum(blocks)
    ids, draws = order.take(epoch * n, (epoch + 1) * n)
    assert order.n_samples == n
    assert sorted(ids.tolist()) == list(range(n))
    assert draws.tolist() == [epoch] * n


@given(
    blocks=BLOCKS,
    window=st.integers(1, 40),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    epochs=st.integers(1, 3),
)
def test_all_ranks_together_see_each_sample_once_an_epoch(
    blocks: list[int], window: int, world_size: int, batch_size: int, epochs: int
) -> None:
    order = SampleOrder(blocks, seed=3, window=window)
    total = epochs * order.n_samples
    seen: Counter[int] = Counter()
    for start in range(0, total, batch_size * world_size):
        for rank in range(world_size):
            mine = start + rank * batch_size
            seen.update(ids_of(order, mine, min(mine + batch_size, total)))
    assert seen == {i: epochs for i in range(order.n_samples)}


@given(blocks=BLOCKS, window=st.integers(1, 40), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_any_division_into_batches_gives_the_same_samples(blocks: list[int], window: int, cuts: list[int]) -> None:
    whole = SampleOrder(blocks, seed=1, window=window).take(0, 60)
    order = SampleOrder(blocks, seed=1, window=window)
    edges = [0, *sorted(cuts), 60]
    parts = [order.take(start, stop) for start, stop in itertools.pairwise(edges)]
    for mine, theirs in zip(zip(*parts, strict=True), whole, strict=True):
        assert np.concatenate(mine).tolist() == theirs.tolist()


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(ids_of(SampleOrder([20], seed=seed), 20 * e, 20 * e + 20)) for seed in range(3) for e in range(3)}
    assert len(orders) == 9


def test_small_set_is_shuffled_as_a_whole_by_one_permutation() -> None:
    # What runs of earlier versions saw: their order stays.
    expected = np.random.default_rng([5, 2]).permutation(30)
    assert ids_of(SampleOrder([10, 20], seed=5, window=30), 60, 90) == expected.tolist()


@given(seed=st.integers(0, 20), epoch=st.integers(0, 5))
def test_window_reads_from_few_blocks(seed: int, epoch: int) -> None:
    order = SampleOrder([10] * 12, seed=seed, window=30)
    for start in range(epoch * 120, (epoch + 1) * 120, 30):
        blocks = {i // 10 for i in ids_of(order, start, start + 30)}
        assert len(blocks) == 3


def test_blocks_and_samples_in_windows_change_places() -> None:
    order = SampleOrder([10] * 12, seed=0, window=30)
    windows = [frozenset(i // 10 for i in ids_of(order, start, start + 30)) for start in range(0, 240, 30)]
    assert len(set(windows)) == 8
    first = ids_of(order, 0, 30)
    assert first != sorted(first)
    assert len({i // 10 for i in first[:10]}) > 1


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1, 1.5, 2, 3.3]), min_size=5, max_size=5),
    window=st.sampled_from([3, 1000]),
)
def test_weight_is_how_often_samples_come(sizes: list[int], weights: list[float], window: int) -> None:
    used = weights[: len(sizes)]
    if sum(size * weight for size, weight in zip(sizes, used, strict=True)) < 1:
        return
    order = SampleOrder(sizes, seed=2, window=window, block_weights=used)
    ids, draws = order.take(0, order.n_samples)
    seen = Counter(ids.tolist())
    starts = np.cumsum([0, *sizes])
    for block, (size, weight) in enumerate(zip(sizes, used, strict=True)):
        counts = [seen[i] for i in range(starts[block], starts[block + 1])]
        assert all(int(weight) <= count <= -int(-weight // 1) for count in counts)
        if used.count(weight) == 1:
            assert sum(counts) == int(size * weight + 0.5 + 1e-9)
    # Whoever comes twice is drawn in another way.
    assert len(set(zip(ids.tolist(), draws.tolist(), strict=True))) == len(ids)


def test_fraction_takes_other_samples_each_epoch_and_no_draw_twice() -> None:
    order = SampleOrder([10, 10], seed=0, block_weights=[0.5, 1.5])
    assert order.n_samples == 5 + 15
    ids, draws = order.take(0, 20 * order.n_samples)
    pairs = list(zip(ids.tolist(), draws.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    epochs = [frozenset(i for i in ids[start : start + 20].tolist() if i < 10) for start in range(0, 400, 20)]
    assert {len(epoch) for epoch in epochs} == {5}
    assert frozenset.union(*epochs) == set(range(10))


@pytest.mark.parametrize("sizes", [[1] * 10, [3, 0, 1, 5, 2, 9, 1, 3], [2]])
@pytest.mark.parametrize("weight", [0.3, 0.5, 1.25, 4.5])
def test_small_blocks_get_their_share_together_and_each_sample_as_often_as_another(
    sizes: list[int], weight: float
) -> None:
    # As shards of a stream are, and shards of which filters leave little.
    order = SampleOrder(sizes, seed=0, window=5, block_weights=[weight] * len(sizes))
    assert order.n_samples == int(sum(sizes) * weight + 0.5)
    epochs = 400
    counts = Counter(ids_of(order, 0, epochs * order.n_samples))
    expected = epochs * order.n_samples / sum(sizes)
    assert set(counts) == set(range(sum(sizes)))
    # Five deviations of a binomial distribution.
    assert all(abs(count - expected) < 5 * (epochs / 4) ** 0.5 for count in counts.values())


def test_settings_say_what_a_position_depends_on() -> None:
    assert SampleOrder([4, 5], seed=7).settings == {"seed": 7, "n_samples": 9, "window": 9}
    assert SampleOrder([4, 5], seed=7, window=3).settings["window"] == 3


@pytest.mark.parametrize(("sizes", "weights"), [([], []), ([0, 0], [1, 1]), ([1], [0.2])])
def test_empty_epoch_is_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least one sample, got \d with weights"):
        SampleOrder(sizes, seed=0, block_weights=weights)


def test_batches_per_epoch_counts_full_ones() -> None:
    assert batches_per_epoch(11, batch_size=2, world_size=2) == 2
    with pytest.raises(ValueError, match=r"global batch of 12 samples \(4 per device on 3 device\(s\)\), got 11"):
        batches_per_epoch(11, batch_size=4, world_size=3)
