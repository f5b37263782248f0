"""Shards as they are written: read back whole, and the same bytes whenever they are made."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dalle1.data.shard_writer import EncodedPicture, write_shard
from dalle1.data.shards import ShardIndex

PICTURES = [
    EncodedPicture(extension="png", data=b"first", width=3, height=2, caption="a red dot", metadata={"scene": [1]}),
    EncodedPicture(extension="jpg", data=b"second", width=5, height=4, caption="ein grüner Punkt"),
]


def test_written_shard_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    assert write_shard(path, iter(PICTURES), first=7) == 2
    first, second = ShardIndex(str(path))
    metadata = {"caption": "a red dot", "key": "000000007", "status": "success", "width": 3, "height": 2, "scene": [1]}
    assert (first.key, first.container) == ("000000007", str(path))
    assert (first.image(), first.text(), first.metadata()) == (b"first", "a red dot", metadata)
    assert (second.key, second.image(), second.text()) == ("000000008", b"second", "ein grüner Punkt")


def test_bytes_of_a_shard_never_change(tmp_path: Path) -> None:
    # The generated data set and what was measured on it are known by these bytes.
    write_shard(tmp_path / "a.tar", PICTURES)
    digest = hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    assert digest == "0ebbfdb522ed5447f421b934446adc75cd59523a29d6d8e259b95503ac908d17"
