"""Samples and batches, and both ways to treat bad samples."""

from __future__ import annotations

import gc
import logging
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dalle1.data.augmentation import augment_file
from dalle1.data.captions import CaptionSource
from dalle1.data.dataset import PairDataset
from dalle1.data.findings import CUT_CAPTION
from dalle1.data.preparation import EncodedCaption, Preparation, collate
from dalle1.data.raw_sample import BadSampleError
from dalle1.data.shards import ShardIndex
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


def pairs(index: ShardIndex, *, on_bad_sample: Any = "error", cache_images: bool = False, **how: Any) -> PairDataset:
    """A data set whose samples are prepared as the keywords say, with pictures of 4 x 4 pixels by default."""
    preparation = Preparation(**{"image_size": 4, **how})
    return PairDataset(index, preparation, on_bad_sample=on_bad_sample, cache_images=cache_images)


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
    dataset = pairs(index, encode_text=encode_length)
    batch = collate([dataset[2], dataset[1]])
    assert batch["pixels"].shape == (2, 3, 4, 4)
    assert batch["pixels"].dtype == torch.uint8
    assert batch["pixels"][:, 0, 0, 0].tolist() == [2, 1]
    assert batch["text_tokens"].tolist() == [[8, 0], [8, 0]]
    assert batch["text_tokens"].dtype == torch.int64
    assert batch["caption"] == ["number 2", "number 1"]
    assert batch["key"] == ["000002", "000001"]
    assert batch["index"].tolist() == [2, 1]
    assert batch["index"].dtype == torch.int64


def test_captions_are_not_needed_without_an_encoder(mixed: ShardIndex) -> None:
    batch = collate([pairs(mixed)[i] for i in (0, 3, 4, 5)])
    assert "text_tokens" not in batch
    assert batch["caption"] == [""] * 4
    assert batch["pixels"].shape == (4, 3, 4, 4)


@pytest.mark.parametrize(("i", "reason"), REASONS.items())
def test_bad_sample_raises_one_sentence_that_names_it(mixed: ShardIndex, i: int, reason: str) -> None:
    dataset = pairs(mixed, encode_text=encode_length)
    with pytest.raises(BadSampleError, match=rf"^{reason}; remove it, or set data\.on_bad_sample=skip$"):
        dataset[i]


def test_sentence_survives_a_loader_worker(mixed: ShardIndex) -> None:
    loader = DataLoader(pairs(mixed), batch_size=1, sampler=[2], num_workers=1, collate_fn=collate)
    with pytest.raises(BadSampleError, match=rf"BadSampleError: {REASONS[2]}; remove it, or set .*=skip\n$") as caught:
        next(iter(loader))
    # They refer to the loader, whose worker is slow to stop if the garbage collector has to do it.
    traceback.clear_frames(caught.tb)


def test_bad_sample_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadSampleError("why", "no caption")))
    assert (str(error), error.kind) == ("why", "no caption")


def test_skip_takes_a_good_sample_that_is_a_function_of_the_bad_one(mixed: ShardIndex) -> None:
    with_text = pairs(mixed, encode_text=encode_length, on_bad_sample="skip")
    taken = [with_text[i]["index"] for i in range(7)]
    assert (taken[0], taken[6]) == (0, 6)
    assert set(taken) == {0, 6}
    assert [with_text.sample(i, draw=3)["index"] for i in range(7)] == taken
    without_text = pairs(mixed, on_bad_sample="skip")
    assert [without_text[i]["key"] for i in (0, 3, 4, 5, 6)] == ["0", "3", "4", "5", "6"]


def test_a_bad_shard_is_replaced_by_samples_from_everywhere(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    bad = [(f"bad-{i}.png", b"broken") for i in range(50)]
    dataset = pairs(
        ShardIndex([write_shard("a.tar", make_samples(50)), write_shard("b.tar", bad)]), on_bad_sample="skip"
    )
    assert len({dataset[i]["index"] for i in range(50, 100)}) > 25


def test_skip_logs_bad_samples_up_to_a_number_of_each_kind(
    mixed: ShardIndex, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dalle1.data.dataset._MOST_LOGGED", 1)
    dataset = pairs(mixed, encode_text=encode_length, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            dataset[1]
    about = [message for message in caplog.messages if "'1'" in message or "no picture" in message]
    assert about[0].startswith("skipped: sample '1' in ")
    assert about[1:] == ["more of this kind (no picture) are counted, but not named"]


def test_bad_samples_travel_with_the_batch(mixed: ShardIndex) -> None:
    dataset = pairs(mixed, encode_text=encode_length, on_bad_sample="skip")
    kinds = ["no picture", "picture cannot be decoded", "no caption", "empty caption", "caption cannot be encoded"]
    assert collate([dataset[0]])["findings"] == {}
    batch = collate([dataset[i] for i in range(1, 6)])
    assert batch["findings"] == {mixed[i].describe(): kind for i, kind in enumerate(kinds, 1)}


def test_cut_captions_are_findings_that_leave_the_sample_as_it_is(
    write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    members = [*make_samples(2), ("2.txt", b"above ten letters"), ("2.png", make_samples(1)[0][1])]
    dataset = pairs(ShardIndex(write_shard("a.tar", members)), encode_text=encode_length)
    batch = collate([dataset[i] for i in (2, 0, 2)])
    assert batch["text_tokens"][:, 0].tolist() == [17, 8, 17]
    assert batch["findings"] == {dataset.index[2].describe(): CUT_CAPTION}


def test_captions_vary_with_seed_epoch_and_number_if_asked_to(
    write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    index = ShardIndex(write_shard("a.tar", make_samples(3)))
    varying = pairs(index, encode_text=encode_draw, vary_text=True, seed=5)
    assert varying.sample(2, draw=7)["text_tokens"].tolist() == [5, 7, 2]
    fixed = pairs(index, encode_text=encode_draw, seed=5)
    assert fixed.sample(2, draw=7)["text_tokens"].tolist() == [-1, -1, -1]


def test_skip_raises_if_all_samples_are_bad(write_shard: WriteShard) -> None:
    index = ShardIndex(write_shard("a.tar", [("1.png", b""), ("2.png", b"")]))
    with pytest.raises(
        BadSampleError, match=r"at least one sample must be good, got 2 bad ones; the last: .*'1'.*not a JPEG"
    ):
        pairs(index, on_bad_sample="skip")[1]


def test_bad_samples_that_are_skipped_stay_in_no_memory(mixed: ShardIndex, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # else pytest keeps what is logged
    dataset = pairs(mixed, encode_text=encode_length, on_bad_sample="skip")
    gc.collect()
    gc.disable()  # it comes late where millions of objects live, as in a training process
    try:
        for i in range(len(dataset)):
            dataset[i]
        assert not [each for each in gc.get_objects() if type(each) is BadSampleError]
    finally:
        gc.enable()


def test_captions_follow_the_policy(mixed: ShardIndex) -> None:
    captions = list(pairs(mixed, on_bad_sample="skip").captions())
    assert captions == ["good", "no picture", "broken picture", "too long" * 5, "good"]
    with pytest.raises(BadSampleError, match=rf"^{REASONS[3]}; remove it"):
        list(pairs(mixed).captions())


def test_cached_pictures_are_decoded_once_and_unchanged(
    write_shard: WriteShard, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_decoded = 0

    def count(*arguments: Any) -> Image.Image:
        nonlocal n_decoded
        n_decoded += 1
        return decode_image(*arguments)

    monkeypatch.setattr("dalle1.data.preparation.decode_image", count)
    index = ShardIndex(write_shard("a.tar", make_samples(2)))
    cached = pairs(index, cache_images=True)
    first = collate([cached[0], cached[1]])["pixels"]
    first.mul_(0)
    again = collate([cached[0], cached[1]])["pixels"]
    assert n_decoded == 2
    assert torch.equal(again, collate([pairs(index)[i] for i in range(2)])["pixels"])


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
    dataset = pairs(pictures, image_size=8, augmentation=augmentation, seed=5)
    for epoch in (0, 3):
        expected = augment_file(pictures[1].image(), augmentation, image_size=8, seed=5, epoch=epoch, key=1)
        assert torch.equal(dataset.sample(1, epoch)["pixels"], expected)
    assert torch.equal(dataset[1]["pixels"], dataset.sample(1, 0)["pixels"])
    assert len({dataset.sample(1, epoch)["pixels"].numpy().tobytes() for epoch in range(20)}) > 2


def test_sample_without_augmentation_is_the_centre_in_every_epoch(pictures: ShardIndex) -> None:
    dataset = pairs(pictures, image_size=8)
    for epoch in (0, 3):
        assert torch.equal(dataset.sample(0, epoch)["pixels"], crop_and_resize(decode_image(pictures[0].image()), 8))


def test_cache_is_refused_with_augmentation(pictures: ShardIndex) -> None:
    with pytest.raises(ValueError, match=r"cache_images must be false with augmentation.*got true .*augmentation=dvae"):
        pairs(pictures, augmentation="dvae", cache_images=True)


def test_background_shows_through(pictures: ShardIndex) -> None:
    for augmentation in ("none", "dvae"):
        dataset = pairs(pictures, image_size=4, background="red", augmentation=augmentation)  # type: ignore[arg-type]
        assert torch.equal(dataset[2]["pixels"][:, 0, 0], torch.tensor([127, 0, 0], dtype=torch.uint8))


@pytest.mark.parametrize("augmentation", ["none", "transformer"])
def test_small_pictures_are_enlarged_or_refused(pictures: ShardIndex, augmentation: Any) -> None:
    enlarged = pairs(pictures, image_size=6, augmentation=augmentation)
    assert enlarged[2]["pixels"].shape == (3, 6, 6)
    refusing = pairs(pictures, image_size=6, augmentation=augmentation, small_pictures="refuse")
    with pytest.raises(BadSampleError, match=r"'2' in .* is too small: .* at least 6 pixels, got 5 .*=enlarge.*=skip$"):
        refusing[2]
    assert refusing[1]["pixels"].shape == (3, 6, 6)
    skipping = pairs(pictures, image_size=6, small_pictures="refuse", on_bad_sample="skip")
    assert skipping[2]["findings"] == {pictures[2].describe(): "picture too small"}


def test_lines_and_fields_give_one_caption_for_each_draw(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    picture = make_samples(1)[0][1]
    members = [
        ("0.png", picture),
        ("0.txt", b"one\n\n two \nthree"),
        ("0.json", b'{"also": ["four", "five"], "n": 6, "half": "\\ud83d", "empty": [" "]}'),
    ]
    index = ShardIndex(write_shard("a.tar", members))

    def captions(setting: str, *, vary_text: bool = True) -> list[str]:
        how = {"caption": CaptionSource(setting=setting), "encode_text": encode_draw, "vary_text": vary_text}
        dataset = pairs(index, **how)
        return [dataset.sample(0, draw)["caption"] for draw in range(30)]

    assert captions("text") == ["one\n\n two \nthree"] * 30
    assert set(captions("lines")) == {"one", "two", "three"}
    assert captions("lines") == captions("lines")
    assert captions("lines", vary_text=False) == ["one"] * 30
    assert set(captions("json:also")) == {"four", "five"}
    assert list(pairs(index, caption=CaptionSource(setting="lines")).captions()) == ["one", "two", "three"]
    for field, message in (
        ("n", "must be a text or a list of texts, got int"),
        ("x", "has no field 'x'"),
        ("half", "has half a character"),
        ("empty", "is empty"),
    ):
        with pytest.raises(BadSampleError, match=message):
            captions(f"json:{field}")
