"""Image tokens in shards: written, read back, refused."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dalle1.data.dataset import PairDataset
from dalle1.data.preparation import Preparation, TokenSource, collate
from dalle1.data.raw_sample import CAPTION, METADATA, BadSampleError, RawSample
from dalle1.data.shards import ShardIndex
from dalle1.data.token_shards import (
    EncodedSample,
    TokenManifest,
    open_tokens,
    read_manifest,
    write_manifest,
    write_token_shard,
)

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
MakeSamples = Callable[..., Members]

MANIFEST = TokenManifest(
    dvae_sha256="ab" * 32,
    vocab_size=50,
    grid=[2, 3],
    image_size=8,
    crops=2,
    augmentation="transformer",
    background="white",
    small_pictures="enlarge",
    seed=0,
    caption="text",
    filters={},
    samples_sha256={"train": "12" * 32, "val": "34" * 32},
    n_shards={"train": [2, 1], "val": [1]},
    weights={"train": [1.0, 2.5], "val": [1.0]},
)


def tokens_of(number: int) -> np.ndarray:
    """Two crops of a grid of 2 x 3."""
    return (np.arange(12, dtype=np.uint16) + number).reshape(2, 2, 3)


def encoded(raw: RawSample, number: int) -> EncodedSample:
    return EncodedSample(raw.key, tokens_of(number), raw.part(CAPTION), raw.part(METADATA))


def test_written_samples_are_read_back(write_shard: WriteShard, make_samples: MakeSamples, tmp_path: Path) -> None:
    source = ShardIndex(write_shard("a.tar", [*make_samples(2), ("deep/x.png", b"no caption")]))
    path = tmp_path / "tokens" / "train-00000.tar"
    assert write_token_shard(path, [encoded(sample, i) for i, sample in enumerate(source)]) == 3
    index = ShardIndex(str(path))
    assert [sample.key for sample in index] == ["000000", "000001", "deep/x"]
    for i, sample in enumerate(index):
        assert sample.image_tokens().tolist() == tokens_of(i).tolist()
        assert sample.metadata() == source[i].metadata()
    assert index[1].text() == "number 1"
    with pytest.raises(BadSampleError, match="has no caption"):
        index[2].text()
    assert list(path.parent.iterdir()) == [path], "nothing half-written stays"


def test_same_samples_give_the_same_bytes(write_shard: WriteShard, make_samples: MakeSamples, tmp_path: Path) -> None:
    source = ShardIndex(write_shard("a.tar", make_samples(2)))
    for name in ("1.tar", "2.tar"):
        write_token_shard(tmp_path / name, [encoded(sample, i) for i, sample in enumerate(source)])
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_keys_that_are_paths_become_numbers(tmp_path: Path) -> None:
    from dalle1.data.folders import FolderIndex

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "b.v1.png"):
        (folder / name).write_bytes(b"")
    write_token_shard(tmp_path / "t.tar", [encoded(sample, 0) for sample in FolderIndex(str(folder))])
    assert [sample.key for sample in ShardIndex(str(tmp_path / "t.tar"))] == ["000000000", "000000001", "000000002"]


def test_numbers_keep_clear_of_real_keys(tmp_path: Path) -> None:
    samples = [EncodedSample(key, tokens_of(0), None, None) for key in ("000000001", "a/b.png", "c.d", "000000001")]
    assert write_token_shard(tmp_path / "t.tar", samples) == 4
    assert len(ShardIndex(str(tmp_path / "t.tar"))) == 4


def test_failing_write_leaves_nothing(write_shard: WriteShard, make_samples: MakeSamples, tmp_path: Path) -> None:
    source = ShardIndex(write_shard("a.tar", make_samples(2)))

    def samples() -> Any:
        yield encoded(source[0], 0)
        raise RuntimeError("power is gone")

    with pytest.raises(RuntimeError):
        write_token_shard(tmp_path / "out" / "t.tar", samples())
    assert list((tmp_path / "out").iterdir()) == []


def _npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image tokens of sample '1' .* cannot be read"),
        (_npy(tokens_of(0))[:-3], "cannot be read"),
        (_npy(tokens_of(0).astype(np.int64)), r"must be uint16 \(crops, rows, columns\), got int64"),
        (_npy(tokens_of(0)[0]), r"must be uint16 .* got uint16 \(2, 3\)"),
        (_npy(np.zeros((0, 2, 3), dtype=np.uint16)), "must be uint16"),
        (_npy(np.array([print], dtype=object), allow_pickle=True), r"cannot be read \(.*allow_pickle=False"),
        (pickle.dumps(tokens_of(0)), "cannot be read"),
        (_npy(tokens_of(60)), r"grid of \(2, 3\) and be below 50, got a grid of \(2, 3\) and up to 71"),
        (_npy(tokens_of(0).reshape(2, 3, 2)), r"got a grid of \(3, 2\)"),
    ],
)
def test_other_tokens_are_bad_samples(write_shard: WriteShard, content: bytes, message: str) -> None:
    index = ShardIndex(write_shard("t.tar", [("1.npy", content)]))
    preparation = Preparation(image_size=8, tokens=TokenSource(grid=(2, 3), vocab_size=50))
    with pytest.raises(BadSampleError, match=message):
        PairDataset(index, preparation)[0]


def test_crops_are_taken_in_turns(write_shard: WriteShard) -> None:
    index = ShardIndex(write_shard("t.tar", [("1.npy", _npy(tokens_of(3)))]))
    dataset = PairDataset(index, Preparation(image_size=8, tokens=TokenSource(grid=(2, 3), vocab_size=50)))
    batch = collate([dataset.sample(0, draw) for draw in range(4)])
    first, second = tokens_of(3).reshape(2, 6).tolist()
    assert batch["image_tokens"].tolist() == [first, second, first, second]
    assert "pixels" not in batch


def test_manifest_is_read_back_and_names_its_shards(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    names = [[Path(path).name for path in source] for source in MANIFEST.shards(tmp_path, "train")]
    assert names == [["train-00000.tar", "train-00001.tar"], ["train-00002.tar"]]


def test_directory_with_other_tokens_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    other = replace(MANIFEST, dvae_sha256="cd" * 32, crops=3)
    expected = (
        r"holds tokens with another dvae_sha256 \(\"abab.*, not \"cdcd.*\) and another crops \(2, not 3\); delete it"
    )
    with pytest.raises(ValueError, match=expected):
        write_manifest(tmp_path, other)


def test_missing_and_damaged_manifests_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"must be a directory that stage=tokens has written, there is no '.*json'"
    ):
        read_manifest(tmp_path)
    (tmp_path / "tokens.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged .*; delete the directory and run stage=tokens again"):
        read_manifest(tmp_path)
    (tmp_path / "tokens.json").write_text(json.dumps(asdict(MANIFEST) | {"format_version": 2}))
    with pytest.raises(ValueError, match="must have format version 1, got 2"):
        read_manifest(tmp_path)
    for content in ({"more": 2}, {"grid": []}, {"weights": {}}, {"grid": 3}):
        (tmp_path / "tokens.json").write_text(json.dumps(asdict(MANIFEST) | content))
        with pytest.raises(ValueError, match="is damaged"):
            read_manifest(tmp_path)
    (tmp_path / "tokens.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(tmp_path)


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    for number in (0, 2):
        with tarfile.open(tmp_path / f"train-{number:05d}.tar", "w"):
            pass
    with pytest.raises(
        ValueError, match=r"it lacks 1 of 3 shards of train, the first '.*train-00001\.tar'; run stage=tok"
    ):
        open_tokens(tmp_path, MANIFEST, "train")
