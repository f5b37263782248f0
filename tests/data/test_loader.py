"""The training loader: exact order, exact resume; the validation loader: everything once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle1.data.dataset import PairDataset
from dalle1.data.findings import Findings
from dalle1.data.loader import ResumableLoader, validation_loader
from dalle1.data.order import SampleOrder
from dalle1.data.preparation import Preparation, Sample
from dalle1.data.shards import ShardIndex
from dalle1.tokenizers.caption_encoder import CaptionEncoder
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig

WriteShard = Callable[[str, list[tuple[str, bytes]]], str]
MakeSamples = Callable[..., list[tuple[str, bytes]]]


class NumberedSamples(PairDataset):
    """Eleven samples without a shard: only their numbers matter."""

    def __init__(self) -> None:
        self.findings = Findings()

    def __len__(self) -> int:
        return 11

    def sample(self, i: int, draw: int) -> Sample:
        pixels = torch.full((3, 1, 1), draw, dtype=torch.uint8)
        return Sample(pixels=pixels, caption="", key=str(i), index=i, findings={})


def resumable(*, batch_size: int = 2, seed: int = 0, rank: int = 0, world_size: int = 1) -> ResumableLoader:
    order = SampleOrder([4, 7], seed=seed, window=5)
    return ResumableLoader(NumberedSamples(), order, batch_size=batch_size, rank=rank, world_size=world_size)


def load(dataset: PairDataset, *, num_workers: int = 0, seed: int = 0) -> ResumableLoader:
    order = SampleOrder(dataset.index.block_sizes, seed=seed)
    return ResumableLoader(dataset, order, batch_size=2, num_workers=num_workers)


def take(loader: ResumableLoader, n_batches: int) -> list[list[int]]:
    """The sample ids of the next batches, over as many epochs as it takes."""
    taken: list[list[int]] = []
    while len(taken) < n_batches:
        for batch in loader:
            taken.append(batch["index"].tolist())
            if len(taken) == n_batches:
                break
    return taken


def test_one_pass_has_the_full_batches_of_an_epoch_and_the_next_another_order() -> None:
    loader = resumable()
    first, second = ([batch["index"].tolist() for batch in loader] for _ in range(2))
    assert len(loader) == len(first) == len(second) == 5
    assert first != second


def test_every_sample_comes_once_an_epoch_and_as_in_that_epoch() -> None:
    loader = resumable()
    seen = [
        (int(pixels.max()), i)
        for _ in range(11)
        for batch in loader
        for pixels, i in zip(batch["pixels"], batch["index"].tolist(), strict=True)
    ]
    assert sorted(seen) == [(epoch, i) for epoch in range(10) for i in range(11)]
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)
    assert all(int(batch["pixels"].max()) == 0 for batch in validation_loader(NumberedSamples(), batch_size=2))


@given(
    stop=st.integers(0, 13), world_size=st.sampled_from([1, 2]), batch_size=st.integers(1, 3), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=30)
def test_resume_anywhere_equals_uninterrupted(stop: int, world_size: int, batch_size: int, seed: int) -> None:
    def loader() -> ResumableLoader:
        return resumable(batch_size=batch_size, seed=seed, rank=world_size - 1, world_size=world_size)

    before = loader()
    start = take(before, stop)
    after = loader()
    after.load_state_dict(before.state_dict())
    assert start + take(after, 14 - stop) == take(loader(), 14)


def test_resumed_pass_ends_where_it_would_have() -> None:
    before = resumable()
    take(before, 8)
    loader = resumable()
    loader.load_state_dict(before.state_dict())
    assert len(list(loader)) == 2
    assert len(list(loader)) == len(loader) == 5


@given(
    stop=st.integers(0, 9),
    before=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    after=st.tuples(st.integers(1, 3), st.integers(1, 2)),
)
@settings(deadline=None, max_examples=40)
def test_other_batches_and_devices_go_on_with_the_next_sample(
    stop: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    def loaders(batch_size: int, world_size: int) -> list[ResumableLoader]:
        return [resumable(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]

    def samples(loaders: list[ResumableLoader], n_batches: int) -> list[int]:
        of_ranks = [take(loader, n_batches) for loader in loaders]
        return [i for batches in zip(*of_ranks, strict=True) for batch in batches for i in batch]

    old, new = loaders(*before), loaders(*after)
    seen = samples(old, stop)
    for loader in new:
        loader.load_state_dict(old[0].state_dict())
    seen += samples(new, 9)
    assert seen == SampleOrder([4, 7], seed=0, window=5).take(0, len(seen))[0].tolist()


def test_another_batch_size_is_told(caplog: pytest.LogCaptureFixture) -> None:
    before = resumable()
    take(before, 3)
    resumable(batch_size=3).load_state_dict(before.state_dict())
    assert caplog.messages == ["continuing after sample 6 with 3 samples in a batch over all devices, not 2 as before"]
    caplog.clear()
    resumable(batch_size=1, world_size=2).load_state_dict(before.state_dict())
    assert not caplog.messages


def test_waiting_is_measured() -> None:
    class Slow(NumberedSamples):
        def sample(self, i: int, draw: int) -> Sample:
            clock[0] += 1.5
            return super().sample(i, draw)

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.perf_counter", lambda: clock[0])
        loader = ResumableLoader(Slow(), SampleOrder([11], seed=0), batch_size=2)
        for _ in loader:
            clock[0] += 100
    assert loader.wait_seconds == 5 * 2 * 1.5


def test_batches_and_resume_do_not_depend_on_workers(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    dataset = PairDataset(ShardIndex(write_shard("a.tar", make_samples(11))), Preparation(image_size=4))
    alone, helped = load(dataset), load(dataset, num_workers=2)
    expected = [batch["pixels"] for _ in range(2) for batch in alone]
    # The pass is left while the workers are some batches ahead.
    batches = [batch["pixels"] for _, batch in zip(range(3), helped, strict=False)]
    assert helped.state_dict()["samples_handed_out"] == 6
    batches += [batch["pixels"] for _ in range(2) for batch in helped]
    helped.close()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmented_batches_and_resume_do_not_depend_on_workers(
    write_shard: WriteShard, encode: Callable[..., bytes], num_workers: int
) -> None:
    noise = torch.randint(0, 256, (7, 18, 26, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    members = [(f"{i}.png", encode(Image.fromarray(picture.numpy()))) for i, picture in enumerate(noise)]
    index = ShardIndex(write_shard("a.tar", members))

    def loader(num_workers: int) -> ResumableLoader:
        preparation = Preparation(image_size=8, augmentation="dvae", seed=1)
        return load(PairDataset(index, preparation), seed=1, num_workers=num_workers)

    whole = loader(0)
    expected = [batch["pixels"] for _ in range(3) for batch in whole]
    before = loader(num_workers)
    batches = [batch["pixels"] for _, batch in zip(range(2), before, strict=False)]
    after = loader(num_workers)
    after.load_state_dict(before.state_dict())
    before.close()
    batches += [batch["pixels"] for _ in range(3) for batch in after]
    after.close()
    assert len(expected) == 9
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_captions_in_pieces_and_resume_do_not_depend_on_workers(
    write_shard: WriteShard, make_samples: MakeSamples, num_workers: int
) -> None:
    index = ShardIndex(write_shard("a.tar", make_samples(7)))
    config = TextTokenizerConfig(vocab_size=270, seq_len=12)
    encode = CaptionEncoder(
        TextTokenizer.train((sample.text() for sample in index), config), truncate=True, bpe_dropout=0.5
    )

    def loader(num_workers: int) -> ResumableLoader:
        preparation = Preparation(image_size=4, encode_text=encode, vary_text=True)
        return load(PairDataset(index, preparation), num_workers=num_workers)

    whole = loader(0)
    expected = [batch["text_tokens"] for _ in range(3) for batch in whole]
    before = loader(num_workers)
    batches = [batch["text_tokens"] for _, batch in zip(range(2), before, strict=False)]
    after = loader(num_workers)
    after.load_state_dict(before.state_dict())
    before.close()
    batches += [batch["text_tokens"] for _ in range(3) for batch in after]
    after.close()
    assert len(expected) == 9
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(batches, expected, strict=True))
    assert len({tuple(row.tolist()) for batch in expected for row in batch}) > len(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_that_workers_met_are_known_once_and_stay_known(
    write_shard: WriteShard, make_samples: MakeSamples, num_workers: int
) -> None:
    bad = [("7.png", b"broken"), ("8.txt", b"no picture")]
    index = ShardIndex(write_shard("a.tar", [*make_samples(4), *bad]))

    def dataset() -> PairDataset:
        return PairDataset(index, Preparation(image_size=4), on_bad_sample="skip")

    known = {index[4].describe(): "picture cannot be decoded", index[5].describe(): "no picture"}
    trained = load(dataset(), num_workers=num_workers)
    assert trained.dataset.findings.named == {}
    for _ in range(2):
        list(trained)
        assert trained.dataset.findings.named == known
    trained.close()
    resumed = load(dataset())
    resumed.load_state_dict(trained.state_dict())
    assert resumed.dataset.findings.named == known

    validated = validation_loader(dataset(), batch_size=2, num_workers=num_workers)
    assert [len(batch["index"]) for batch in validated] == [2, 2, 2]
    assert validated.dataset.findings.named == known


def test_close_stops_the_workers_and_keeps_the_place(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    dataset = PairDataset(ShardIndex(write_shard("a.tar", make_samples(6))), Preparation(image_size=4))
    loader = load(dataset, num_workers=1)
    take(loader, 1)
    assert len(multiprocessing.active_children()) == 1
    loader.close()
    assert multiprocessing.active_children() == []
    assert len(take(loader, 2)) == 2
    assert loader.state_dict()["samples_handed_out"] == 6
    loader.close()


def test_state_is_the_same_on_all_ranks_and_of_plain_types() -> None:
    states = []
    for rank in range(2):
        loader = resumable(rank=rank, world_size=2)
        take(loader, 3)
        states.append(loader.state_dict())
    order = {"seed": 0, "n_samples": 11, "window": 5}
    place = {"samples_handed_out": 12, "batches_of_pass": 1, "global_batch_size": 4}
    assert states[0] == states[1] == {**place, **order, "findings": {"named": {}, "unnamed": {}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "data.seed 5, not 0"),
        ({"n_samples": 90}, "n_samples 90, not 11"),
        ({"window": 3, "seed": 1}, r"data.seed 1, not 0; data.shuffle_window \(which ends with the data\) 3, not 5"),
    ],
)
def test_load_refuses_a_state_of_another_order(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"saved with: {message}; restore them, or start a new run"):
        resumable().load_state_dict(resumable().state_dict() | changes)


def test_load_refuses_a_state_of_an_earlier_version() -> None:
    with pytest.raises(ValueError, match="only be resumed with the backend and the version of dalle1 that saved it"):
        resumable().load_state_dict({"n_batches": 3, "seed": 0})


def test_loader_refuses_fewer_samples_than_a_global_batch() -> None:
    with pytest.raises(ValueError, match=r"batch of 12 samples .* got 11"):
        resumable(batch_size=6, world_size=2)


def test_iterating_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(resumable())
    list(validation_loader(NumberedSamples(), batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_needs_a_sample_for_every_device() -> None:
    with pytest.raises(ValueError, match=r"at least as many samples as devices \(12\), got 11"):
        validation_loader(NumberedSamples(), batch_size=2, world_size=12)


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_shows_every_sample_once_over_all_ranks(world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        loader = validation_loader(NumberedSamples(), batch_size=2, rank=rank, world_size=world_size)
        ids = [i for batch in loader for i in batch["index"].tolist()]
        assert ids == list(range(rank, 11, world_size))
        seen += ids
    assert sorted(seen) == list(range(11))
