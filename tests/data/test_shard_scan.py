"""Headers of tars: the quick way finds what tarfile finds, whoever wrote them and whatever is broken."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle1.data import shard_scan
from dalle1.data.shard_scan import scan_shard

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30)
MEMBERS = st.tuples(
    st.lists(NAMES, max_size=6), st.sampled_from(["jpg", "txt", "json", "PNG", "npy"]), st.binary(max_size=1100)
)


def _tar(
    members: list[tuple[str, bytes]], tar_format: int, *, mtime: float = 0, kinds: dict[str, bytes] | None = None
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            info.type = (kinds or {}).get(name, tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _found(path: Path, *, quickly: bool) -> object:
    """What a scan gives, or what it raises."""
    with pytest.MonkeyPatch.context() as patched:
        if not quickly:

            def give_up(file: object) -> None:
                raise shard_scan._UnusualError

            patched.setattr(shard_scan, "_usual_members", give_up)
        content = scan_shard(str(path))
    return content.keys, content.byte_ranges.tolist(), content.damages


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("mtime", [0, 1.5])  # WebDataset writes fractions, which takes a header of its own
@settings(max_examples=40, deadline=None)
@given(members=st.lists(MEMBERS, max_size=6))
def test_quick_scan_finds_what_tarfile_finds(
    tmp_path_factory: pytest.TempPathFactory, tar_format: int, mtime: float, members: list[Any]
) -> None:
    files = [("/".join([*folders, f"{i}.{ending}"]), data) for i, (folders, ending, data) in enumerate(members)]
    try:
        content = _tar(files, tar_format, mtime=mtime)
    except ValueError:  # names that USTAR cannot hold
        return
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    path.write_bytes(content)
    assert _found(path, quickly=True) == _found(path, quickly=False)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), tar_format=st.sampled_from(FORMATS))
def test_damage_is_told_as_tarfile_tells_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, tar_format: int
) -> None:
    content = bytearray(_tar([("deep/" * 30 + "a.jpg", b"abc"), ("b.txt", b"d" * 600)], tar_format, mtime=1.5))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), place, 512, 1000]))])
    assert _found(path, quickly=True) == _found(path, quickly=False)


def test_usual_shards_are_scanned_quickly_and_all_others_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow: list[str] = []
    any_members = shard_scan._any_members
    monkeypatch.setattr(shard_scan, "_any_members", lambda file, shard: slow.append(shard) or any_members(file, shard))
    files = [("1.jpg", b"abc"), ("日本/" * 40 + "2.txt", b"d"), ("folder", b"")]
    for number, tar_format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(_tar(files, tar_format, mtime=1.5, kinds={"folder": tarfile.DIRTYPE}))
        assert scan_shard(str(path)).keys == ["1", "日本/" * 40 + "2"]
    assert not slow
    # Space for content beyond 8 GB is written in another way.
    path = tmp_path / "large.tar"
    info = tarfile.TarInfo("1.jpg")
    info.size = 9 * 2**30
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    (damage,) = scan_shard(str(path)).damages
    assert damage.message == f"shard '{path}' is truncated: the tar end mark is missing; replace it"
    assert slow == [str(path)]
