"""What filters leave of an index, and how often it is looked at."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalle1.data import filter_scan
from dalle1.data.captions import CaptionSource
from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.data.facts import read_facts, read_size
from dalle1.data.filter_scan import filter_index
from dalle1.data.filters import FilterConfig, SampleFacts
from dalle1.data.sample_index import SampleIndex
from dalle1.data.sources import open_index

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
Encode = Callable[..., bytes]
TEXT = CaptionSource()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DALLE1_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "filters"


@pytest.fixture
def shard(write_shard: WriteShard, encode: Encode) -> str:
    """Pictures of 8 x 8, 20 x 8, 8 x 17, 30 x 30 pixels, one without a caption, a broken one."""
    sizes = [(8, 8), (20, 8), (8, 17), (30, 30)]
    members: Members = []
    for number, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        members += [(f"{number}.png", encode(Image.fromarray(noise))), (f"{number}.txt", b"word " * (number + 1))]
        members.append((f"{number}.json", b'{"similarity": 0.%d}' % number))
    members += [("4.png", members[0][1]), ("5.png", b"broken"), ("5.txt", b"five words in the caption")]
    path = write_shard("a.tar", members)
    facts = os.stat(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns - 100 * 10**9))
    return path


def kept(index: SampleIndex, **filters: Any) -> list[str]:
    return [sample.key for sample in filter_index(index, FilterConfig(**filters), TEXT).index]


def test_each_sample_counts_under_its_first_reason(shard: str, caplog: pytest.LogCaptureFixture) -> None:
    index = open_index([shard])
    with caplog.at_level(logging.INFO):
        result = filter_index(index, FilterConfig(max_aspect=2, min_side=8, min_caption_words=2), TEXT)
    assert [sample.key for sample in result.index] == ["3"]
    assert result.dropped == {
        "aspect above 2": 2,
        "caption below 2 words": 1,
        "no caption": 1,
        "picture unreadable": 1,
    }
    assert result.index.block_sizes.tolist() == [1]
    assert caplog.messages[-1].startswith("filters keep 1 of 6 samples: aspect above 2 (2), ")


def test_without_filters_nothing_is_read(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.data.raw_sample.RawSample.part", lambda *_: pytest.fail("read"))
    index = open_index([shard])
    assert filter_index(index, FilterConfig(), TEXT).index is index


def test_only_what_filters_ask_for_is_read(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = open_index([shard])[1]
    assert read_facts(sample, TEXT, FilterConfig(max_aspect=2)) == SampleFacts(width=20, height=8)
    assert read_facts(sample, TEXT, FilterConfig(min_caption_words=1)) == SampleFacts(caption="word word")
    assert read_facts(sample, TEXT, FilterConfig(json={"similarity": 0.1})) == SampleFacts(metadata={"similarity": 0.1})
    monkeypatch.setattr("dalle1.data.raw_sample.RawSample.image", lambda *_: pytest.fail("read whole"))
    assert read_size(sample) == (20, 8)


def test_size_behind_a_large_profile_is_found(write_shard: WriteShard, encode: Encode) -> None:
    picture = encode(Image.new("RGB", (9, 7)), "JPEG", icc_profile=b"x" * 60_000)
    assert read_size(open_index([write_shard("b.tar", [("1.jpg", picture)])])[0]) == (9, 7)


def test_metadata_decide_if_asked_to(shard: str) -> None:
    assert kept(open_index([shard]), json={"similarity": {"min": 0.2}}) == ["2", "3"]


def test_near_duplicates_are_left_out_within_what_else_stays(shard: str) -> None:
    # Sample 4 is sample 0 again.
    assert kept(open_index([shard]), near_duplicates=0) == ["0", "1", "2", "3", "5"]
    assert kept(open_index([shard]), near_duplicates=0, min_caption_words=2) == ["1", "2", "3", "5"]


def test_verdicts_are_found_out_once(shard: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    looked: list[int] = []
    judge = filter_scan._Judge.__call__

    def count(self: Any, numbers: range) -> Any:
        looked.extend(numbers)
        return judge(self, numbers)

    monkeypatch.setattr(filter_scan._Judge, "__call__", count)
    for _ in range(2):
        assert kept(open_index([shard]), min_side=9) == ["3"]
    assert looked == list(range(6))
    # Other filters, other captions and a shard that has changed are other questions.
    kept(open_index([shard]), min_side=8)
    filter_index(open_index([shard]), FilterConfig(min_side=9), CaptionSource(setting="lines"))
    os.utime(shard, ns=(0, 10**9))
    kept(open_index([shard]), min_side=9)
    assert len(looked) == 4 * 6
    for path in cache.glob("*.npz"):
        path.write_bytes(b"damaged")
    kept(open_index([shard]), min_side=9)
    assert len(looked) == 5 * 6


def test_verdicts_on_what_could_not_be_read_are_not_remembered(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    index = open_index([shard])
    with monkeypatch.context() as broken:
        broken.setattr("dalle1.data.shards.os.pread", fail)
        for filters in ({"min_caption_words": 2}, {"min_side": 9}, {"near_duplicates": 0}, {"json": {"x": 1}}):
            assert set("0123") <= set(kept(index, **filters))
    assert kept(open_index([shard]), min_side=9) == ["3"]
    assert kept(open_index([shard]), near_duplicates=0) == ["0", "1", "2", "3", "5"]


def test_damaged_shards_are_remembered_by_what_is_whole_of_them(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(shard, os.path.getsize(shard) // 2)
    os.utime(shard, ns=(0, 10**9))
    whole = kept(open_index([shard], skip_damage=True), min_caption_words=1)
    monkeypatch.setattr(filter_scan, "_judge", lambda *_, **__: pytest.fail("looked again"))
    assert kept(open_index([shard], skip_damage=True), min_caption_words=1) == whole


def test_devices_share_the_cores_where_each_has_to_look(
    shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def note(work: Any, parts: list[range], n_processes: int) -> Any:
        started.append(n_processes)
        return map(work, parts)

    monkeypatch.setattr(filter_scan, "map_parts", note)
    monkeypatch.setattr(filter_scan, "n_usable_cores", lambda: 8)
    monkeypatch.setattr(filter_scan, "_SAMPLES_WORTH_A_PROCESS", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    kept(open_index([shard]), min_side=9)  # one device looks, the others wait for what it finds
    table = tmp_path / "table.jsonl"
    table.write_text('{"path": "x.png", "caption": "a b"}\n' * 9)
    kept(open_index([str(table)]), min_caption_words=2)
    assert started == [6, 2]


def test_cache_that_cannot_be_written_costs_nothing_but_time(shard: str, cache: Path) -> None:
    index = open_index([shard])
    cache.write_text("a file where the directory should be")
    assert kept(index, min_side=9) == ["3"]


def test_several_processes_find_what_one_finds(
    write_shard: WriteShard, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [(f"{i}.png", encode(Image.new("RGB", (1 + i % 7, 5), (i * 12, 0, 0)))) for i in range(20)]
    index = open_index([write_shard(f"{n}.tar", members[5 * n : 5 * n + 5]) for n in range(4)])
    alone = kept(index, min_side=3)
    monkeypatch.setattr(filter_scan, "_SAMPLES_WORTH_A_PROCESS", 5)
    monkeypatch.setattr(filter_scan, "_PART", 3)
    assert kept(index, min_side=3) == alone
    assert 0 < len(alone) < 20


def test_nothing_left_is_an_error(shard: str) -> None:
    with pytest.raises(
        ValueError, match=r"must keep at least one sample, got none of 6: side below 99 \(5\), picture unr"
    ):
        kept(open_index([shard]), min_side=99)


def test_training_has_an_epoch_of_what_is_left(shard: str) -> None:
    filters = FilterConfig(max_aspect=2)
    config = DataConfig(train=shard, val=shard, image_size=4, batch_size=2, num_workers=0, filters=filters)
    data = PairDataModule(config)
    loader = data.train_dataloader()
    # 0, 3 and 4; the broken one and the long ones are gone.
    assert len(loader) == 1
    keys = [key for _ in range(3) for batch in loader for key in batch["key"]]
    assert sorted(keys) == ["0", "0", "3", "3", "4", "4"]
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 3
    assert data.count_dropped() == {"aspect above 2": 4, "picture unreadable": 2}
