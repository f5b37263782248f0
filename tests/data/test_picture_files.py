"""What paths name as pictures: files, folders, globs, shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dalle1.data.picture_files import find_pictures
from dalle1.data.raw_sample import BadSampleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures at several depths, and other files."""
    for name in ("b.JPG", "a.png", "sub/c.webp", "sub/deep/d.jpeg", ".hidden.png", ".git/e.png", "notes.txt", "s.tar"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "folder"


def test_folder_of_a_run_has_its_pictures_and_not_their_grids(tmp_path: Path) -> None:
    sampled = "0001-a-red-circle-0007.png"
    for name in (sampled, "grid.png", "image.png", "mask.png", "preview.png", "mine/grid.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "manifest.json").touch()
    assert sources(tmp_path) == [str(tmp_path / sampled), str(tmp_path / "mine" / "grid.png")]


def test_folder_with_a_manifest_of_others_has_all_its_pictures(folder: Path) -> None:
    expected = sources(folder)
    (folder / "manifest.json").touch()
    assert sources(folder) == expected


def sources(*patterns: str | Path) -> list[str]:
    return [file.source for file in find_pictures([str(pattern) for pattern in patterns])]


def test_folder_is_read_at_any_depth_in_sorted_order(folder: Path) -> None:
    files = find_pictures([str(folder)])
    assert [os.path.relpath(file.source, folder) for file in files] == [
        "a.png",
        "b.JPG",
        "sub/c.webp",
        "sub/deep/d.jpeg",
    ]
    assert [file.stem for file in files] == ["a", "b", "c", "d"]
    assert files[2].read() == b"sub/c.webp"


def test_files_keep_the_order_in_which_they_are_named_and_any_extension(folder: Path) -> None:
    named = [f"{folder}/notes.txt", f"{folder}/a.png"]
    assert sources(*named) == named


def test_file_named_twice_is_one_picture(folder: Path) -> None:
    assert len(sources(folder / "a.png", folder, folder / "sub" / ".." / "a.png")) == 4


def test_glob_is_expanded_and_sorted(folder: Path) -> None:
    assert sources(folder / "*.[jJpP]*") == [f"{folder}/a.png", f"{folder}/b.JPG"]
    assert sources(folder / "**" / "*.jpeg") == [f"{folder}/sub/deep/d.jpeg"]


def test_name_that_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a[1].png"
    path.touch()
    assert sources(path) == [str(path)]


def test_shard_gives_its_samples(tmp_path: Path, write_shard: Callable[..., str]) -> None:
    shard = write_shard("x.tar", [("in/01.jpg", b"one"), ("in/01.txt", b"a caption"), ("02.txt", b"no picture")])
    first, second = find_pictures([shard])
    assert (first.source, first.stem, first.read()) == (f"{shard}/in/01", "01", b"one")
    with pytest.raises(BadSampleError, match="has no picture"):
        second.read()


def test_captions_are_those_of_samples_and_of_text_files_of_the_same_name(
    tmp_path: Path, write_shard: Callable[..., str]
) -> None:
    for name in ("a.png", "a.b.png", "c.png"):
        (tmp_path / name).touch()
    # As some editors on Windows write it.
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one \r\n")
    (tmp_path / "a.b.txt").write_text("zwölf", encoding="utf-8")
    shard = write_shard("x.tar", [("1.jpg", b""), ("1.txt", b" two\n"), ("2.jpg", b"")])
    files = find_pictures([*(str(tmp_path / name) for name in ("a.png", "a.b.png", "c.png")), shard])
    assert [file.read_caption() for file in files] == ["one", "zwölf", None, "two", None]


def test_caption_that_is_no_text_is_named(tmp_path: Path, write_shard: Callable[..., str]) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_bytes(b"\xff")
    beside, of_sample = find_pictures(
        [str(tmp_path / "a.png"), write_shard("x.tar", [("1.jpg", b""), ("1.txt", b"\xff")])]
    )
    with pytest.raises(ValueError, match=r"its caption must be UTF-8 text, '.*a.txt' is not"):
        beside.read_caption()
    with pytest.raises(BadSampleError, match="is not UTF-8 text"):
        of_sample.read_caption()


def test_what_is_not_there_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no picture, folder or shard at '.*none-\*.png'; correct the path"):
        sources(tmp_path / "none-*.png")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder '.*empty' must hold pictures \(.jpg, .*\), it has none"):
        sources(folder / "empty")
    with pytest.raises(ValueError, match="must be files, folders or shards, got '/dev/null'"):
        sources("/dev/null")
    with pytest.raises(ValueError, match="truncated"):
        sources(folder / "s.tar")
