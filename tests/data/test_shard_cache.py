"""What is remembered of shards, and when it no longer counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dalle1.data import shard_cache
from dalle1.data.shard_cache import read_shards
from dalle1.data.shard_scan import ShardContent, scan_shard
from dalle1.data.shards import ShardIndex

WriteShard = Callable[[str, list[tuple[str, bytes]]], str]
MakeSamples = Callable[..., list[tuple[str, bytes]]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DALLE1_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose headers were read."""
    names: list[str] = []

    def scan(shard: str) -> ShardContent:
        names.append(Path(shard).name)
        return scan_shard(shard)

    monkeypatch.setattr(shard_cache, "scan_shard", scan)
    return names


@pytest.fixture
def shard(write_shard: WriteShard, make_samples: MakeSamples) -> str:
    """One that was not changed lately."""
    return _age(write_shard("a.tar", make_samples(3)))


def _age(shard: str, seconds: int = 100) -> str:
    facts = os.stat(shard)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns - seconds * 10**9))
    return shard


def test_headers_are_read_once(shard: str, scanned: list[str]) -> None:
    first, second = (next(read_shards([shard])) for _ in range(2))
    assert scanned == ["a.tar"]
    assert first.keys == second.keys
    assert np.array_equal(first.byte_ranges, second.byte_ranges)
    assert ShardIndex(shard)[2].key == first.keys[2]
    assert scanned == ["a.tar"]


def test_shards_keep_their_order_whichever_are_remembered(
    write_shard: WriteShard, make_samples: MakeSamples, scanned: list[str]
) -> None:
    members = make_samples(4)
    size = len(members) // 4
    names = [_age(write_shard(f"{i}.tar", members[i * size : (i + 1) * size])) for i in range(4)]
    expected = [scan_shard(name).keys for name in names]
    list(read_shards([names[2], names[0]]))
    assert sorted(scanned) == ["0.tar", "2.tar"]
    assert [content.keys for content in read_shards(names)] == expected
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_changed_shard_is_read_again(
    shard: str, write_shard: WriteShard, make_samples: MakeSamples, scanned: list[str]
) -> None:
    list(read_shards([shard]))
    _age(write_shard("a.tar", make_samples(5)))
    assert len(next(read_shards([shard])).keys) == 5
    _age(shard, seconds=7)
    list(read_shards([shard]))
    assert scanned == ["a.tar"] * 3


def test_shard_that_was_changed_just_now_is_not_remembered(
    write_shard: WriteShard, make_samples: MakeSamples, scanned: list[str], cache: Path
) -> None:
    shard = write_shard("a.tar", make_samples(3))
    list(read_shards([shard]))
    assert not cache.exists()
    list(read_shards([shard]))
    assert scanned == ["a.tar"] * 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _replace(path: Path, **changes: np.ndarray) -> None:
    with np.load(path) as stored:
        content = dict(stored) | changes
    np.savez(path, **content)


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        lambda path: path.write_bytes(b""),
        lambda path: _replace(path, byte_ranges=np.zeros((2, 4, 2), dtype=np.int64)),
        lambda path: _replace(path, byte_ranges=np.zeros((3, 4, 2))),
        lambda path: _replace(path, keys=np.frombuffer(b"[", dtype=np.uint8)),
        lambda path: np.savez(path, state=np.array([{}], dtype=object)),
    ],
)
def test_damaged_memory_is_made_again(
    shard: str, scanned: list[str], cache: Path, damage: Callable[[Path], object]
) -> None:
    (content,) = read_shards([shard])
    (path,) = cache.iterdir()
    damage(path)
    assert next(read_shards([shard])).keys == content.keys
    list(read_shards([shard]))
    assert scanned == ["a.tar"] * 2


def test_cache_that_cannot_be_written_costs_nothing_but_time(shard: str, scanned: list[str], cache: Path) -> None:
    cache.parent.write_text("a file where the directory should be")
    for _ in range(2):
        assert len(next(read_shards([shard])).keys) == 3
    assert scanned == ["a.tar"] * 2


def test_after_a_bad_shard_the_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    over = threading.Event()

    def scan(shard: str) -> ShardContent:
        begun.append(shard)
        if len(begun) == 1:
            raise ValueError("bad")
        over.wait()  # a shard takes long
        raise ValueError("never looked at")

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            over.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(shard_cache, "_MOST_THREADS", 1)
    monkeypatch.setattr(shard_cache, "scan_shard", scan)
    monkeypatch.setattr(shard_cache, "ThreadPoolExecutor", Pool)
    shards = [tmp_path / f"{number}.tar" for number in range(20)]
    for path in shards:
        path.touch()
    with pytest.raises(ValueError, match="bad"):
        list(read_shards([str(path) for path in shards]))
    assert len(begun) <= 2


def test_first_bad_shard_is_named_and_not_remembered(shard: str, tmp_path: Path, cache: Path) -> None:
    bad = []
    for name in ("b.tar", "c.tar"):
        (tmp_path / name).write_bytes(b"no tar" * 200)
        bad.append(_age(str(tmp_path / name)))
    with pytest.raises(ValueError, match=r"shard '.*b\.tar' is not a readable, uncompressed tar file"):
        ShardIndex([shard, *bad])
    assert len(list(cache.iterdir())) == 1
