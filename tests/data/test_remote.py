"""Shards from elsewhere, read from beginning to end."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from http_files import serve

from dalle1.data import remote
from dalle1.data.raw_sample import BadSampleError
from dalle1.data.remote import expand_addresses, read_shard
from dalle1.data.shard_scan import Damage
from dalle1.data.shards import ShardIndex
from dalle1.data.sources import without_secrets

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
MakeSamples = Callable[..., Members]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    return slept


def keys(shard: str) -> tuple[list[str], list[Damage]]:
    """Keys of the samples and the damages of a shard."""
    damages: list[Damage] = []
    return [sample.key for sample in read_shard(shard, damages.append)], damages


def test_stream_gives_what_the_index_gives(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    members = [*make_samples(4), ("./x/a.b.png", b"other"), ("y/1.JPEG", b"J"), (".hidden.jpg", b""), ("notes.md", b"")]
    path = write_shard("a.tar", members)
    index = ShardIndex(path)
    streamed = list(read_shard(path, lambda damage: pytest.fail(damage.message)))
    assert [sample.key for sample in streamed] == [sample.key for sample in index]
    for mine, theirs in zip(streamed[:4], index, strict=False):
        assert (mine.image(), mine.text(), mine.metadata()) == (theirs.image(), theirs.text(), theirs.metadata())
        assert mine.describe() == theirs.describe()
    with pytest.raises(BadSampleError, match=r"sample 'y/1' in '.*a\.tar' has no caption"):
        streamed[4].text()


def test_web_server_local_file_and_command_give_the_same(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    path = write_shard("a.tar", make_samples(3))
    with serve(Path(path).parent) as (address, _):
        shards = expand_addresses([f"{address}/a.tar", path, f"pipe:cat {path}"], allow_pipe=True)
        results = [keys(shard) for shard in shards]
    assert results == [(["000000", "000001", "000002"], [])] * 3


def test_large_shard_is_read_of_a_server_that_knows_no_ranges(
    write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    members = [(f"{i}.png", b"x" * (3 << 20)) for i in range(3)]  # fsspec asks for parts of files above 5 MB
    folder = Path(write_shard("a.tar", members)).parent
    with serve(folder) as (address, asked):
        assert keys(f"{address}/a.tar") == (["0", "1", "2"], [])
    assert asked.count("/a.tar") == 1


def test_compressed_shard_is_refused(make_samples: MakeSamples, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, data in make_samples(2):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found, (damage,) = keys(f"{tmp_path}/a.tar.gz")
    assert (found, damage.kind) == ([], "shard is truncated")


def test_ranges_and_globs_name_addresses(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    assert expand_addresses(["https://h/{00..02}.tar"]) == [f"https://h/0{i}.tar" for i in range(3)]
    folder = Path(write_shard("a.tar", make_samples(1))).parent
    shutil.copy(folder / "a.tar", folder / "b.tar")
    assert expand_addresses([f"file://{folder}/*.tar"]) == [f"file://{folder}/{name}.tar" for name in "ab"]
    assert expand_addresses([f"{folder}/[ab].tar"]) == [f"{folder}/a.tar", f"{folder}/b.tar"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat a.tar", r"a command is only run with data\.allow_pipe=true, got 'pipe:cat a\.tar'"),
        (
            "https://h/shards/",
            r"must be tar files, got directory 'https://h/shards/'; write 'https://h/shards/\*\.tar'",
        ),
        ("file:///no/such/*.tar", r"no shards match 'file:///no/such/\*\.tar'; correct the address"),
        ("nonsense://h/*.tar", r"the shards at 'nonsense://h/\*\.tar' cannot be listed \(.*nonsense"),
        ("https://h/{0..2.tar", r"as many \{ as \}"),
    ],
)
def test_other_addresses_are_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_addresses([path])


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec, "open", missing)
    with pytest.raises(ValueError, match=r"'s3://b/a\.tar' needs a package that is not installed; pip install s3fs"):
        keys("s3://b/a.tar")


def test_command_of_a_shard_name_is_not_run_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pipe"):
        expand_addresses([f"pipe:touch {tmp_path}/mark"])
    assert not (tmp_path / "mark").exists()


def test_connection_that_breaks_off_goes_on_where_it_was(
    write_shard: WriteShard, make_samples: MakeSamples, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(write_shard("a.tar", make_samples(40))).parent
    with serve(folder, breaks={"/a.tar": [0.5]}) as (address, _):
        found, damages = keys(f"{address}/a.tar")
    assert found == [f"{i:06d}" for i in range(40)]
    assert damages == []
    assert pauses == [1.0]
    assert "broke off" in caplog.text


def test_server_that_stays_away_is_told_after_some_tries(
    write_shard: WriteShard, make_samples: MakeSamples, pauses: list[float]
) -> None:
    folder = Path(write_shard("a.tar", make_samples(40))).parent
    with serve(folder, breaks={"/a.tar": [0.5] * 9}) as (address, _):
        found, (damage,) = keys(f"{address}/a.tar")
    assert found == [f"{i:06d}" for i in range(len(found))]
    assert damage.kind == "shard cannot be read"
    assert pauses[-2:] == [1.0, 2.0]  # more came before if an answer happened to bring new samples


def test_server_that_never_sends_long_is_asked_as_often_as_it_helps(
    write_shard: WriteShard, pauses: list[float]
) -> None:
    # As one does that gives up on a reader that is slow; what is wrong with the shard is told once all the same.
    # Each fifth of it is more than what may get lost in buffers.
    members = [("../x.png", b"out"), *((f"{i:06d}.png", bytes(100_000)) for i in range(40))]
    folder = Path(write_shard("a.tar", members)).parent
    with serve(folder, breaks={"/a.tar": [0.2, 0.4, 0.6, 0.8]}) as (address, _):
        found, (damage,) = keys(f"{address}/a.tar")
    assert found == [f"{i:06d}" for i in range(40)]
    assert "x.png" in damage.message
    assert pauses == [1.0] * 4


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:secret@host/a.tar?X-Amz-Signature=secret", "https://host/a.tar"),
        ("s3://key:secret@bucket/a?.tar", "s3://bucket/a?.tar"),
        ("hf://datasets/a@main/b.tar", "hf://datasets/a@main/b.tar"),
        ("a@b/c?.tar", "a@b/c?.tar"),
    ],
)
def test_secrets_of_addresses_are_not_shown(address: str, shown: str) -> None:
    assert without_secrets(address) == shown


def test_secrets_of_addresses_are_in_no_sample_and_no_damage(
    write_shard: WriteShard, make_samples: MakeSamples, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(write_shard("a.tar", make_samples(4))).parent
    damages: list[Damage] = []
    with serve(folder, breaks={"/b.tar": [0.5] * 9}) as (address, _):
        samples = list(read_shard(f"{address}/a.tar?secret=1", damages.append))
        assert {sample.container for sample in samples} == {f"{address}/a.tar"}
        list(read_shard(f"{address}/gone.tar?secret=1", damages.append))
    list(read_shard(f"{address}/off.tar?secret=1", damages.append))
    assert len(damages) == 2
    assert "secret" not in caplog.text + "".join(damage.message for damage in damages)


def test_reason_of_a_web_server_or_a_command_is_more_than_its_name(tmp_path: Path, pauses: list[float]) -> None:
    with serve(tmp_path) as (address, _):
        _, (gone,) = keys(f"{address}/gone.tar")
    assert pauses == []
    _, (closed,) = keys(f"{address}/gone.tar")
    assert pauses == [1.0, 2.0]  # it may come up again
    _, (failed,) = keys("pipe:false")
    assert "404" in gone.message
    assert "Connect" in closed.message
    assert "its command ended with status 1" in failed.message


def test_address_that_is_named_twice_is_refused() -> None:
    for paths in (["http://h/{0,1}.tar", "http://h/1.tar"], ["pipe:cat a", "pipe:cat a"]):
        with pytest.raises(ValueError, match=r"each shard must be named once, got '.*' 2 times"):
            expand_addresses(paths, allow_pipe=True)


def test_missing_shard_is_told_at_once(tmp_path: Path, pauses: list[float]) -> None:
    with serve(tmp_path) as (address, _):
        for shard in (f"{address}/gone.tar", f"{tmp_path}/gone.tar"):
            found, (damage,) = keys(shard)
            assert found == []
            assert damage.kind == "shard cannot be read"
            assert "gone.tar" in damage.message
    assert pauses == []


@pytest.mark.parametrize("cut", [700, 5000])
def test_samples_before_a_cut_count(write_shard: WriteShard, make_samples: MakeSamples, cut: int) -> None:
    path = write_shard("a.tar", make_samples(4))
    os.truncate(path, cut)
    found, (damage,) = keys(path)
    assert found == [f"{i:06d}" for i in range(len(found))]
    assert len(found) < 4
    assert (damage.kind, "truncated or no tar file" in damage.message) == ("shard is truncated", True)


def test_what_is_no_tar_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>not found</html>" * 100)
    found, (damage,) = keys(f"{tmp_path}/a.tar")
    assert (found, damage.kind) == ([], "shard is truncated")


def test_second_file_of_a_kind_and_names_that_lead_out_are_told(
    write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    members = [
        *make_samples(1),
        ("1.png", b"A"),
        ("1.png", b"B"),
        ("5.jpg", b"A"),
        ("5.png", b"B"),
        ("../2.png", b"C"),
        ("/3.png", b"D"),
        ("4.txt", b"E"),
    ]
    found, damages = keys(write_shard("a.tar", members))
    assert found == ["000000", "1", "5", "4"]
    kinds = [damage.kind for damage in damages]
    assert sorted(kinds) == ["key used twice"] * 2 + ["name leads out of the shard"] * 2


def test_part_that_is_too_large_is_not_taken_into_memory(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    members = [("1.txt", b"x" * (2 << 20)), ("1.png", b"A"), *make_samples(1)]
    path = write_shard("a.tar", members)
    for sample in (next(read_shard(path, lambda _: None)), ShardIndex(path)[0]):
        with pytest.raises(BadSampleError, match=r"the caption \(\.txt\) of sample '1' .* at most 1,048,576 bytes"):
            sample.text()
        assert sample.image() == b"A"
