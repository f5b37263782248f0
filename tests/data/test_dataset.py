"""Samples and batches, and both ways to treat bad samples."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dalle1.data.augmentation import augment
from dalle1.data.dataset import CUT_CAPTION, EncodedCaption, PairDataset, collate
from dalle1.data.shards import BadSampleError, ShardIndex
from dalle1.data.transforms import crop_and_resize, decode_image

WriteShard = Callable[[str, list[tuple[str, bytes]]], str]
MakeSamples = Callable[..., list[tuple[str, bytes]]]


def encode_length(caption: str, draw: str | None) -> EncodedCaption:
    """A caption as its length and a zero; above 20 characters it does not fit, above 10 it is cut."""
    if len(caption) > 20:
        raise ValueError(f"caption must have at most 20 characters, got {len(caption)}")
    return EncodedCaption(torch.tensor([len(caption), 0]), is_cut=len(caption) > 10)


def encode_draw(caption: str, draw: str | None) -> EncodedCaption:
    """The seed of a caption's draw as its tokens."""
    return EncodedCaption(torch.tensor([int(number) for number in (draw or "-1|-1|-1").split("|")]), is_cut=False)


@pytest.fixture
def mixed(write_shard: WriteShard, make_samples: MakeSamples) -> ShardIndex:
    """Good samples 0 and 6; 1..5 have no picture, a broken one, no caption, an empty one and one too long."""
    picture = make_samples(1)[0][1]
    members = [
        ("0.png", picture),
        ("0.txt", b"good"),
        ("1.txt", b"no picture"),
        ("2.png", picture[:40]),
        ("2.txt", b"broken picture"),
        ("3.png", picture),
        ("4.png", picture),
        ("4.txt", b" \n"),
        ("5.png", picture),
        ("5.txt", b"too long" * 5),
        ("6.png", picture),
        ("6.txt", b"good"),
    ]
    return ShardIndex(write_shard("mixed.tar", members))


REASONS = {
    1: r"sample '1' in '.*mixed\.tar' has no picture \(.*\)",
    2: r"picture of sample '2' in '.*mixed\.tar' cannot be decoded \(.+\)",
    3: r"sample '3' in '.*mixed\.tar' has no caption \(\.txt\)",
    4: r"caption of sample '4' in '.*mixed\.tar' is empty",
    5: r"caption of sample '5' in '.*mixed\.tar' cannot be encoded \(.*at most 20 characters, got 40\)",
}


def test_batch_has_the_documented_shapes_and_ranges(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    index = ShardIndex(write_shard("a.tar", make_samples(3)))
    dataset = PairDataset(index, image_size=4, encode_text=encode_length)
    batch = collate([dataset[2], dataset[1]])
    assert batch["image"].shape == (2, 3, 4, 4)
    assert batch["image"].dtype == torch.float32
    assert torch.equal(batch["image"][:, 0, 0, 0], torch.tensor([2.0, 1.0]) / 255)
    assert batch["text_tokens"].tolist() == [[8, 0], [8, 0]]
    assert batch["text_tokens"].dtype == torch.int64
    assert batch["caption"] == ["number 2", "number 1"]
    assert batch["key"] == ["000002", "000001"]
    assert batch["index"].tolist() == [2, 1]
    assert batch["index"].dtype == torch.int64


def test_captions_are_not_needed_without_an_encoder(mixed: ShardIndex) -> None:
    batch = collate([PairDataset(mixed, image_size=4)[i] for i in (0, 3, 4, 5)])
    assert "text_tokens" not in batch
    assert batch["caption"] == [""] * 4
    assert batch["image"].shape == (4, 3, 4, 4)


@pytest.mark.parametrize(("i", "reason"), REASONS.items())
def test_bad_sample_raises_one_sentence_that_names_it(mixed: ShardIndex, i: int, reason: str) -> None:
    dataset = PairDataset(mixed, image_size=4, encode_text=encode_length)
    with pytest.raises(BadSampleError, match=rf"^{reason}; remove it, or set data\.on_bad_sample=skip$"):
        dataset[i]


def test_sentence_survives_a_loader_worker(mixed: ShardIndex) -> None:
    loader = DataLoader(PairDataset(mixed, image_size=4), batch_size=1, sampler=[2], num_workers=1, collate_fn=collate)
    with pytest.raises(BadSampleError, match=rf"BadSampleError: {REASONS[2]}; remove it, or set .*=skip\n$") as caught:
        next(iter(loader))
    # They refer to the loader, whose worker is slow to stop if the garbage collector has to do it.
    traceback.clear_frames(caught.tb)


def test_bad_sample_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadSampleError("why", "no caption")))
    assert (str(error), error.kind) == ("why", "no caption")


def test_skip_takes_the_next_good_sample_and_wraps_around(mixed: ShardIndex) -> None:
    with_text = PairDataset(mixed, image_size=4, encode_text=encode_length, on_bad_sample="skip")
    assert [with_text[i]["index"] for i in range(7)] == [0, 6, 6, 6, 6, 6, 6]
    without_text = PairDataset(mixed, image_size=4, on_bad_sample="skip")
    assert [without_text[i]["key"] for i in range(7)] == ["0", "3", "3", "3", "4", "5", "6"]


def test_skip_wraps_around_at_the_end(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    index = ShardIndex(write_shard("a.tar", [*make_samples(2), ("9.png", b"broken")]))
    assert PairDataset(index, image_size=4, on_bad_sample="skip")[2]["index"] == 0


def test_skip_logs_each_bad_sample_once(mixed: ShardIndex, caplog: pytest.LogCaptureFixture) -> None:
    dataset = PairDataset(mixed, image_size=4, encode_text=encode_length, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        for i in (1, 1, 3):
            dataset[i]
    assert len(caplog.messages) == 5
    for message, i in zip(caplog.messages, REASONS, strict=True):
        assert message.startswith("skipped: ")
        assert f"sample '{i}'" in message


def test_bad_samples_are_counted_by_kind_and_travel_with_the_batch(mixed: ShardIndex) -> None:
    dataset = PairDataset(mixed, image_size=4, encode_text=encode_length, on_bad_sample="skip")
    assert collate([dataset[0]])["findings"] == {}
    for _ in range(2):
        assert collate([dataset[3], dataset[4]])["findings"] == {
            3: "no caption",
            4: "empty caption",
            5: "caption cannot be encoded",
        }
    assert dataset[1]["findings"].keys() == {1, 2, 3, 4, 5}
    assert dataset.findings == {
        1: "no picture",
        2: "picture cannot be decoded",
        3: "no caption",
        4: "empty caption",
        5: "caption cannot be encoded",
    }


def test_cut_captions_are_findings_that_leave_the_sample_as_it_is(
    write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    members = [*make_samples(2), ("2.txt", b"above ten letters"), ("2.png", make_samples(1)[0][1])]
    dataset = PairDataset(ShardIndex(write_shard("a.tar", members)), image_size=4, encode_text=encode_length)
    batch = collate([dataset[i] for i in (2, 0, 2)])
    assert batch["text_tokens"][:, 0].tolist() == [17, 8, 17]
    assert batch["findings"] == dataset.findings == {2: CUT_CAPTION}


def test_captions_vary_with_seed_epoch_and_number_if_asked_to(
    write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    index = ShardIndex(write_shard("a.tar", make_samples(3)))
    varying = PairDataset(index, image_size=4, encode_text=encode_draw, vary_text=True, seed=5)
    assert varying.sample(2, epoch=7)["text_tokens"].tolist() == [5, 7, 2]
    fixed = PairDataset(index, image_size=4, encode_text=encode_draw, seed=5)
    assert fixed.sample(2, epoch=7)["text_tokens"].tolist() == [-1, -1, -1]


def test_skip_raises_if_all_samples_are_bad(write_shard: WriteShard) -> None:
    index = ShardIndex(write_shard("a.tar", [("1.png", b""), ("2.png", b"")]))
    with pytest.raises(
        BadSampleError, match=r"at least one sample must be good, got 2 bad ones; the last: .*'1'.*not a JPEG"
    ):
        PairDataset(index, image_size=4, on_bad_sample="skip")[1]


def test_captions_follow_the_policy(mixed: ShardIndex) -> None:
    captions = list(PairDataset(mixed, image_size=4, on_bad_sample="skip").captions())
    assert captions == ["good", "no picture", "broken picture", "too long" * 5, "good"]
    with pytest.raises(BadSampleError, match=rf"^{REASONS[3]}; remove it"):
        list(PairDataset(mixed, image_size=4).captions())


def test_cached_pictures_are_decoded_once_and_unchanged(
    write_shard: WriteShard, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_decoded = 0

    def count(*arguments: Any) -> Image.Image:
        nonlocal n_decoded
        n_decoded += 1
        return decode_image(*arguments)

    monkeypatch.setattr("dalle1.data.dataset.decode_image", count)
    index = ShardIndex(write_shard("a.tar", make_samples(2)))
    cached = PairDataset(index, image_size=4, cache_images=True)
    first = collate([cached[0], cached[1]])["image"]
    first.mul_(0)
    again = collate([cached[0], cached[1]])["image"]
    assert n_decoded == 2
    assert torch.equal(again, collate([PairDataset(index, image_size=4)[i] for i in range(2)])["image"])


@pytest.fixture
def pictures(write_shard: WriteShard, encode: Callable[..., bytes]) -> ShardIndex:
    """Noise of 20 x 14, 14 x 20 and 12 x 5 pixels; the last one is half transparent black."""
    generator = torch.Generator().manual_seed(0)
    members = []
    for i, (height, width) in enumerate([(14, 20), (20, 14)]):
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        members.append((f"{i}.png", encode(Image.fromarray(noise.numpy()))))
    members.append(("2.png", encode(Image.new("RGBA", (12, 5), (0, 0, 0, 128)))))
    return ShardIndex(write_shard("pictures.tar", members))


@pytest.mark.parametrize("augmentation", ["dvae", "transformer"])
def test_augmented_sample_is_a_function_of_number_seed_and_epoch(pictures: ShardIndex, augmentation: Any) -> None:
    dataset = PairDataset(pictures, image_size=8, augmentation=augmentation, seed=5)
    whole = torch.from_numpy(np.array(decode_image(pictures.image(1)))).permute(2, 0, 1)
    for epoch in (0, 3):
        expected = augment(whole, augmentation, image_size=8, seed=5, epoch=epoch, key=1)
        assert torch.equal(dataset.sample(1, epoch)["pixels"], expected)
    assert torch.equal(dataset[1]["pixels"], dataset.sample(1, 0)["pixels"])
    assert len({dataset.sample(1, epoch)["pixels"].numpy().tobytes() for epoch in range(20)}) > 2


def test_sample_without_augmentation_is_the_centre_in_every_epoch(pictures: ShardIndex) -> None:
    dataset = PairDataset(pictures, image_size=8)
    for epoch in (0, 3):
        assert torch.equal(dataset.sample(0, epoch)["pixels"], crop_and_resize(decode_image(pictures.image(0)), 8))


def test_cache_holds_whole_pictures_for_augmentation(pictures: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = PairDataset(pictures, image_size=8, augmentation="dvae")
    cached = PairDataset(pictures, image_size=8, augmentation="dvae", cache_images=True)
    expected = [fresh.sample(i, epoch)["pixels"] for epoch in range(3) for i in range(3)]
    first = [cached.sample(i, 0)["pixels"].clone() for i in range(3)]
    monkeypatch.setattr("dalle1.data.dataset.decode_image", lambda *_: pytest.fail("decoded again"))
    later = [cached.sample(i, epoch)["pixels"] for epoch in (1, 2) for i in range(3)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first + later, expected, strict=True))


def test_background_shows_through(pictures: ShardIndex) -> None:
    for augmentation in ("none", "dvae"):
        dataset = PairDataset(pictures, image_size=4, background="red", augmentation=augmentation)  # type: ignore[arg-type]
        assert torch.equal(dataset[2]["pixels"][:, 0, 0], torch.tensor([127, 0, 0], dtype=torch.uint8))


@pytest.mark.parametrize("augmentation", ["none", "transformer"])
def test_small_pictures_are_enlarged_or_refused(pictures: ShardIndex, augmentation: Any) -> None:
    enlarged = PairDataset(pictures, image_size=6, augmentation=augmentation)
    assert enlarged[2]["pixels"].shape == (3, 6, 6)
    refusing = PairDataset(pictures, image_size=6, augmentation=augmentation, small_pictures="refuse")
    with pytest.raises(BadSampleError, match=r"'2' in .* is too small: .* at least 6 pixels, got 5 .*=enlarge.*=skip$"):
        refusing[2]
    assert refusing[1]["pixels"].shape == (3, 6, 6)
    skipping = PairDataset(pictures, image_size=6, small_pictures="refuse", on_bad_sample="skip")
    assert skipping[2]["findings"] == {2: "picture too small"}
