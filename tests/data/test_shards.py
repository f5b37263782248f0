"""Random access to tar shards: what is found in them, and what is said of broken ones."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dalle1.data import shards
from dalle1.data.raw_sample import BadSampleError
from dalle1.data.shards import ShardIndex, expand_shards

WriteShard = Callable[[str, list[tuple[str, bytes]]], str]
MakeSamples = Callable[..., list[tuple[str, bytes]]]


def test_expand_sorts_the_matches_of_a_glob_and_keeps_the_order_of_a_list(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c [1].tar"):
        (tmp_path / name).touch()
    literal = str(tmp_path / "c [1].tar")
    assert expand_shards([literal, f"{tmp_path}/[ab].tar"]) == [literal, f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]


def test_expand_takes_braces_as_a_shell_does(tmp_path: Path) -> None:
    names = [*(f"a-{number:03d}.tar" for number in range(8, 12)), "b.tar", "c.tar", "{0..1}.tar", "{.tar"]
    for name in names:
        (tmp_path / name).touch()

    def expanded(*patterns: str) -> list[str]:
        return [Path(shard).name for shard in expand_shards([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert expanded("a-{008..011}.tar", "{c,b}.tar") == [*names[:4], "c.tar", "b.tar"]
    assert expanded("a-{00,01}*.tar") == names[:4]
    assert expanded("{0..1}.tar", "{.tar") == ["{0..1}.tar", "{.tar"], "files of these very names go first"
    with pytest.raises(FileNotFoundError, match=r"no shards match '.*a-012\.tar'"):
        expanded("a-{011..013}.tar")
    with pytest.raises(ValueError, match=r"shards must have as many \{ as \} in their name, got '.*\{0\.\.2\.tar'"):
        expanded("{0..2.tar")


@pytest.mark.parametrize("address", ["pipe:cat x.tar", "https://example.org/x.tar", "s3://bucket/x.tar"])
def test_expand_refuses_pipes_and_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=f"must be local tar files, got '{address}'"):
        expand_shards(address)


def test_expand_refuses_a_directory(tmp_path: Path) -> None:
    for directory in (str(tmp_path), f"{tmp_path}/", "missing/"):
        with pytest.raises(ValueError, match=r"must be tar files, got directory .*; write '.*/\*\.tar'"):
            expand_shards(directory)


def test_expand_refuses_a_pattern_without_match() -> None:
    with pytest.raises(FileNotFoundError, match=r"no shards match 'missing/\*\.tar'; correct the path"):
        expand_shards("missing/*.tar")


def test_expand_refuses_an_empty_list_and_other_types() -> None:
    with pytest.raises(ValueError, match="got an empty list"):
        expand_shards([])
    with pytest.raises(TypeError, match="got 7"):
        expand_shards(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got \['a.tar', 7\]"):
        expand_shards(["a.tar", 7])  # type: ignore[list-item]


def test_expand_refuses_a_shard_named_twice(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match=r"got '.*a\.tar' 2 times"):
        expand_shards([f"{tmp_path}/a.tar", f"{tmp_path}/*.tar"])


def test_index_reads_samples_of_all_shards_in_any_order(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    members = make_samples(5)
    index = ShardIndex([write_shard("a.tar", members[:6]), write_shard("b.tar", members[6:])])
    assert len(index) == 5
    for i in (4, 0, 3, 0):
        sample = index[i]
        assert (sample.key, sample.text(), sample.metadata()) == (f"{i:06d}", f"number {i}", {"number": i})
        assert sample.image() == dict(members)[f"{i:06d}.png"]
        assert os.path.basename(sample.container) == ("a.tar" if i < 2 else "b.tar")
    assert [sample.text() for sample in index] == [f"number {i}" for i in range(5)]
    assert index.block_sizes.tolist() == [2, 3]


def test_key_is_the_directory_and_the_name_before_the_first_dot(write_shard: WriteShard) -> None:
    members = [
        ("./x/1.jpg", b"J"),
        ("./x/1.txt", b"one"),
        ("y/1.JPEG", b"K"),
        ("y/1.txt", b" two\n"),
        ("2.webp", b"W"),
        ("2.txt", b""),
        ("2.seg.png", b"another kind of file"),
        (".hidden.jpg", b"no key"),
        ("notes.md", b"no sample"),
    ]
    index = ShardIndex(write_shard("a.tar", members))
    assert [sample.key for sample in index] == ["x/1", "y/1", "2"]
    assert [sample.text() for sample in index] == ["one", "two", ""]
    assert [sample.image() for sample in index] == [b"J", b"K", b"W"]


def test_members_of_a_sample_need_not_be_neighbours(write_shard: WriteShard) -> None:
    index = ShardIndex(write_shard("a.tar", [("1.jpg", b"A"), ("2.jpg", b"B"), ("2.txt", b"two"), ("1.txt", b"one")]))
    assert [sample.text() for sample in index] == ["one", "two"]
    assert index[0].metadata() == {}


@pytest.mark.parametrize(
    ("member", "what"), [("1.jpg", "picture"), ("1.png", "picture"), ("1.txt", "caption"), ("1.json", "metadata file")]
)
def test_duplicate_key_is_refused(write_shard: WriteShard, member: str, what: str) -> None:
    members = [("1.jpg", b""), ("1.txt", b""), ("1.json", b"{}"), (member, b"")]
    with pytest.raises(ValueError, match=rf"sample '1' in '.*a\.tar' has more than one {what}"):
        ShardIndex(write_shard("a.tar", members))


def test_missing_and_undecodable_parts_are_named_when_read(write_shard: WriteShard) -> None:
    members = [
        ("1.jpg", b"J"),
        ("2.txt", b"two"),
        ("3.jpg", b"J"),
        ("3.txt", b"caf\xe9"),
        ("3.json", b"{"),
        ("4.json", b"[]"),
    ]
    index = ShardIndex(write_shard("a.tar", members))
    with pytest.raises(BadSampleError, match=r"sample '1' in '.*a\.tar' has no caption \(\.txt\)"):
        index[0].text()
    with pytest.raises(BadSampleError, match=r"sample '2' in '.*a\.tar' has no picture"):
        index[1].image()
    with pytest.raises(BadSampleError, match=r"caption of sample '3' in '.*a\.tar' is not UTF-8 text \(.*0xe9.*\)"):
        index[2].text()
    with pytest.raises(BadSampleError, match=r"metadata of sample '3' in '.*a\.tar' is not JSON"):
        index[2].metadata()
    with pytest.raises(BadSampleError, match=r"metadata of sample '4' in '.*a\.tar' must be a JSON object, got list"):
        index[3].metadata()


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b compressed"])
def test_file_that_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"shard '.*a\.tar' is not a readable, uncompressed tar file"):
        ShardIndex(str(tmp_path / "a.tar"))


def test_picture_in_the_place_of_a_shard_is_refused_with_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG" * 300)
    with pytest.raises(
        ValueError, match=r"not a readable, uncompressed tar file .*; that is a picture: give the folder"
    ):
        ShardIndex(str(tmp_path / "a.png"))


# Members of one block each: cut in the last header, in the last content, after it.
@pytest.mark.parametrize("size", [2 * 512 + 100, 3 * 512 + 3, 4 * 512])
def test_truncated_tar_is_named(write_shard: WriteShard, size: int) -> None:
    path = write_shard("a.tar", [("1.jpg", b"J" * 500), ("1.txt", b"one" * 100)])
    os.truncate(path, size)
    with pytest.raises(ValueError, match=r"shard '.*a\.tar' is (truncated|not a readable, uncompressed tar file)"):
        ShardIndex(path)


def test_shards_without_any_sample_are_refused(write_shard: WriteShard) -> None:
    with pytest.raises(ValueError, match=r"must hold samples, .* none in '.*a\.tar'"):
        ShardIndex(write_shard("a.tar", [("notes.md", b"")]))


def test_shard_cut_after_the_scan_is_reported(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    path = write_shard("a.tar", make_samples(2))
    index = ShardIndex(path)
    os.truncate(path, 1000)
    with pytest.raises(
        BadSampleError, match=r"'000001' in '.*a\.tar' cannot be read \(the shard was changed while in use\)"
    ):
        index[1].image()


def test_index_survives_pickling_after_use(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    index = ShardIndex(write_shard("a.tar", make_samples(2)))
    before = index[1].image()
    assert pickle.loads(pickle.dumps(index))[1].image() == before


def test_number_of_open_shards_is_bounded(
    write_shard: WriteShard, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of all indexes together: a mixture has one for each source.
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    monkeypatch.setattr(shards, "_open_files", {})
    n_open_before = len(os.listdir("/dev/fd"))
    paths = [write_shard(f"{i}.tar", make_samples(1, start=i)) for i in range(4)]
    indexes = [ShardIndex(paths), ShardIndex(paths[2:])]
    for i in (0, 1, 2, 3, 0, 3):
        assert indexes[0][i].text() == f"number {i}"
        assert indexes[1][i // 2].text() == f"number {2 + i // 2}"
    assert len(os.listdir("/dev/fd")) == n_open_before + 2
    for descriptor in shards._open_files.values():
        os.close(descriptor)


def test_no_more_files_to_open_is_no_bad_sample(
    write_shard: WriteShard, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShardIndex(write_shard("a.tar", make_samples(1)))

    def refuse(*_: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(shards.os, "open", refuse)
    with pytest.raises(OSError, match=r"too many files are open; allow more, `ulimit -n 4096`"):
        index[0].text()
