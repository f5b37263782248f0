"""Shards that somebody made to do harm: nothing is executed, nothing is written, nothing hangs."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.data.raw_sample import BadSampleError
from dalle1.data.remote import read_shard
from dalle1.data.shard_scan import scan_shard
from dalle1.data.shards import ShardIndex
from dalle1.data.token_shards import EncodedSample, write_token_shard

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
MakeSamples = Callable[..., Members]


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def _special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def hostile(tmp_path: Path, make_samples: MakeSamples, mark: Path) -> str:
    """Two good samples among pickles, links, devices and names that lead elsewhere."""
    bomb = pickle.dumps(Bomb(mark))
    array = io.BytesIO()
    np.save(array, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    members = [
        *make_samples(2),
        ("000000.pyd", bomb),
        ("000000.pickle", bomb),
        ("000001.pth", bomb),
        ("000001.npy", array.getvalue()),
        ("../escaped.png", b""),
        ("a/../../escaped.png", b""),
        ("/escaped.png", b""),
        ("\x1b[31m\n.png", b""),
    ]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        tar.addfile(_special("link.png", tarfile.SYMTYPE, "/etc/passwd"))
        tar.addfile(_special("hard.png", tarfile.LNKTYPE, "/etc/passwd"))
        tar.addfile(_special("device.png", tarfile.CHRTYPE))
        tar.addfile(_special("pipe.png", tarfile.FIFOTYPE))
        tar.addfile(_special("folder.png", tarfile.DIRTYPE))
    return str(path)


@pytest.mark.parametrize("backend", ["indexed", "stream"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_good_samples_are_read_and_nothing_else_happens(
    hostile: str, mark: Path, backend: Any, num_workers: int
) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(hostile).parent.rglob("*")}
    config = DataConfig(
        train=hostile,
        val=hostile,
        backend=backend,
        image_size=4,
        batch_size=2,
        num_workers=num_workers,
        on_bad_sample="skip",
        max_bad_fraction=1.0,
    )
    data = PairDataModule(config)
    loader = data.train_dataloader()
    keys = {key for _, batch in zip(range(5), _endless(loader), strict=False) for key in batch["key"]}
    keys |= {key for batch in data.val_dataloader() for key in batch["key"]}
    loader.close()
    assert keys == {"000000", "000001"}
    assert data.count_findings()["name leads out of the shard"] >= 1
    assert not mark.exists()
    assert {path: path.stat().st_mtime_ns for path in Path(hostile).parent.rglob("*")} == before


def _endless(loader: Any) -> Any:
    while True:
        yield from loader


def test_by_default_the_shard_is_refused_by_name(hostile: str) -> None:
    with pytest.raises(ValueError, match=r"has a file whose name leads out of it, '\.\./escaped\.png'; replace it"):
        ShardIndex(hostile)


def test_links_and_devices_are_no_samples(hostile: str) -> None:
    keys = [sample.key for sample in ShardIndex(hostile, skip_damage=True)]
    assert keys == ["000000", "000001", "\x1b[31m\n"]
    assert [sample.key for sample in read_shard(hostile, lambda _: None)] == keys


def test_control_characters_do_not_reach_a_terminal(hostile: str) -> None:
    odd = ShardIndex(hostile, skip_damage=True)[2]
    assert "\x1b" not in odd.describe()
    assert "\n" not in odd.describe()


def test_object_arrays_are_not_unpickled(hostile: str, mark: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        ShardIndex(hostile, skip_damage=True)[1].image_tokens()
    assert not mark.exists()


def test_written_keys_stay_in_their_shard(hostile: str, tmp_path: Path) -> None:
    tokens = np.zeros((1, 2, 2), dtype=np.uint16)
    samples = [EncodedSample(sample.key, tokens, None, None) for sample in ShardIndex(hostile, skip_damage=True)]
    samples.append(EncodedSample("../out", tokens, None, None))
    write_token_shard(tmp_path / "tokens.tar", samples)
    with tarfile.open(tmp_path / "tokens.tar") as tar:
        assert all(not name.startswith("/") and ".." not in name for name in tar.getnames())


def test_size_that_is_a_lie_takes_no_memory(tmp_path: Path, make_samples: MakeSamples) -> None:
    info = tarfile.TarInfo("1.png")
    info.size = 1 << 42
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 600)
    with pytest.raises(ValueError, match="truncated"):
        ShardIndex(str(path))
    found: list[str] = []
    assert list(read_shard(str(path), lambda damage: found.append(damage.kind))) == []
    assert found == ["shard is truncated"]


def _header(kind: bytes, size: int, name: str = "h") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def _record(value: str) -> bytes:
    content = f" size={value}\n"
    length = len(content) + len(str(len(content) + 3))
    return f"{length}{content}".encode().ljust(-(-length // 512) * 512, b"\0")


@pytest.mark.parametrize("value", ["9" * 30, "9" * 5000, "-1", "1e9", "٣"])
def test_numbers_that_are_no_sizes_are_damage(tmp_path: Path, value: str) -> None:
    record = _record(value)
    path = tmp_path / "a.tar"
    path.write_bytes(
        _header(b"x", len(record.rstrip(b"\0"))) + record + _header(b"0", 3, "1.png") + b"abc".ljust(512, b"\0")
    )
    assert scan_shard(str(path)).damages
    found: list[str] = []
    list(read_shard(str(path), lambda damage: found.append(damage.kind)))
    assert found


@pytest.mark.parametrize("kind", [b"x", b"L", b"g", b"K"])
def test_headers_that_would_fill_the_memory_are_damage(
    tmp_path: Path, kind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(_header(kind, 1 << 33))
        file.truncate(1 << 33)  # a hole, which takes no disk
    asked: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: asked.append(size) or pread(fd, size, at))
    assert scan_shard(str(path)).damages
    found: list[str] = []
    list(read_shard(str(path), lambda damage: found.append(damage.kind)))
    assert found == ["shard is truncated"]
    assert max(asked) <= 1 << 20


def test_named_pipe_is_no_shard_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=r"shard '.*a\.tar' cannot be read \(it is not a file\)"):
        ShardIndex(str(tmp_path / "a.tar"))
    found: list[str] = []
    assert list(read_shard(str(tmp_path / "a.tar"), lambda damage: found.append(damage.message))) == []
    assert "it is not a file" in found[0]


def test_shard_that_is_replaced_while_in_use_gives_no_mixed_samples(
    write_shard: WriteShard, make_samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard("a.tar", make_samples(3))
    index = ShardIndex(path)
    write_shard("a.tar", make_samples(3, start=7))
    with pytest.raises(BadSampleError, match="was changed while in use"):
        index[0].text()


def test_read_only_folder_is_enough(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    folder = Path(write_shard("a.tar", make_samples(2))).parent
    folder.chmod(0o555)
    try:
        assert len(ShardIndex(f"{folder}/a.tar")) == 2
    finally:
        folder.chmod(0o755)
