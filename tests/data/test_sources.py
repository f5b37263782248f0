"""Places that pictures come from: what may be named, folders, tables, several at once."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dalle1.data.folders import FolderIndex, TableIndex
from dalle1.data.raw_sample import CAPTION, METADATA, BadSampleError
from dalle1.data.sample_index import PackedStrings, SampleIndex, Selection
from dalle1.data.sources import Source, is_remote, open_index, parse_sources

WriteShard = Callable[[str, list[tuple[str, bytes]]], str]
MakeSamples = Callable[..., list[tuple[str, bytes]]]


def test_paths_without_weight_are_one_source_and_mappings_are_others() -> None:
    assert parse_sources("a.tar") == [Source(paths=("a.tar",))]
    assert parse_sources(["a.tar", "b"]) == [Source(paths=("a.tar", "b"))]
    setting: Any = [{"path": ["b.tar", "c.tar"], "weight": 2.5}, "a.tar", {"path": "d"}]
    assert parse_sources(setting) == [
        Source(paths=("a.tar",)),
        Source(paths=("b.tar", "c.tar"), weight=2.5),
        Source(paths=("d",)),
    ]
    assert parse_sources({"path": "a.tar", "weight": 2}) == [Source(paths=("a.tar",), weight=2.0)]


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        (3, TypeError, "data.val must be a path, a glob or a list of them, got 3"),
        ([3], TypeError, r"must be a path, a glob or a list of them, got \[3\]"),
        ([], ValueError, "must name at least one tar file, folder or table, got an empty list"),
        ([{"weight": 2}], TypeError, "must have a path or a list of paths under 'path', got"),
        ([{"path": "a", "wieght": 2}], ValueError, "has the fields path and weight, got 'wieght'"),
        ([{"path": "a", "weight": "2"}], TypeError, "weight must be a number > 0, got '2'"),
        ([{"path": "a", "weight": True}], TypeError, "weight must be a number > 0, got True"),
        ([{"path": "a", "weight": 0}], ValueError, "weight must be a finite number > 0, got 0"),
        ([{"path": "a", "weight": float("inf")}], ValueError, "weight must be a finite number > 0, got inf"),
    ],
)
def test_other_settings_are_refused(setting: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_sources(setting, "data.val")


@pytest.mark.parametrize("path", ["https://h/a.tar", "s3://b/a.tar", "gs://b/a.tar", "hf://d/a.tar", "pipe:cat a.tar"])
def test_addresses_and_commands_are_remote(path: str) -> None:
    assert is_remote(path)
    assert Source(paths=("a.tar", path)).is_remote
    assert not is_remote("a/b.tar")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one with a caption and metadata, and what is none."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "b.v1.JPG").write_bytes(b"B")
    (root / "b.v1.txt").write_text(" two words\n")
    (root / "b.v1.json").write_text('{"n": 1}')
    (root / "deep" / "a.png").write_bytes(b"A")
    (root / ".hidden" / "c.png").write_bytes(b"C")
    (root / "notes.txt").write_text("no picture")
    return root


def test_folder_has_its_pictures_with_the_captions_beside_them(folder: Path) -> None:
    index = FolderIndex(str(folder))
    assert [sample.key for sample in index] == ["b.v1.JPG", "deep/a.png"]
    assert [sample.image() for sample in index] == [b"B", b"A"]
    assert (index[0].text(), index[0].metadata()) == ("two words", {"n": 1})
    assert index[1].metadata() == {}
    with pytest.raises(BadSampleError, match=r"sample 'deep/a\.png' in '.*pictures' has no caption"):
        index[1].text()


def test_file_that_vanishes_is_a_bad_sample(folder: Path) -> None:
    index = FolderIndex(str(folder))
    (folder / "deep" / "a.png").unlink()
    with pytest.raises(BadSampleError, match=r"'deep/a\.png' in .* cannot be read \(No such file or directory\)"):
        index[1].image()


def test_named_pipe_is_no_picture(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    index = FolderIndex(str(folder))
    with pytest.raises(BadSampleError, match=r"'pipe\.png' in .* cannot be read \(.* is no file\)"):
        next(sample for sample in index if sample.key == "pipe.png").image()


ROWS = [
    {"path": "pictures/b.v1.JPG", "caption": 'a "quoted", one', "n": "7"},
    {"path": "gone.png", "caption": "ü 日本"},
]


def _write_table(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
        return
    tab = "\t" if path.suffix == ".tsv" else ","
    quoted = ROWS[0]["caption"].replace('"', '""')
    lines = [tab.join(["path", "caption", "n"]), tab.join([ROWS[0]["path"], f'"{quoted}"', "7"])]
    path.write_text(
        "\ufeff" + "\n".join([*lines, tab.join([ROWS[1]["path"], ROWS[1]["caption"], ""])]), encoding="utf-8"
    )


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl"])
def test_table_has_the_pictures_that_its_rows_name(folder: Path, extension: str) -> None:
    table = folder.parent / f"list.{extension}"
    _write_table(table)
    index = TableIndex(str(table))
    assert index[0].image() == b"B"
    assert index[0].text() == ROWS[0]["caption"]
    assert index[0].metadata()["n"] == "7"
    assert index[1].text() == "ü 日本"
    with pytest.raises(BadSampleError, match=r"sample 'gone\.png' in '.*list\..*' cannot be read \(No such file"):
        index[1].image()
    assert pickle.loads(pickle.dumps(index))[1].text() == "ü 日本"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"file,caption\nx.png,y\n",
            r"must have a column 'path' \(and 'caption'\) in its first line, got file, c",
        ),
        ("a.csv", b"", "must have a column 'path' .* got nothing"),
        ("a.csv", b"path,caption\n", "must have rows, it has none"),
        ("a.csv", b"path,caption\nx.png,one, two\n", "line 2 of table .* as many fields as the first line"),
        ("a.csv", b"path,caption\n,one\n", "line 2 of table .* must have a path"),
        ("a.csv", b"path,caption\nx.png,caf\xe9\n", "must be UTF-8 text, it is not"),
        ("a.csv", b"path,caption\nx.png," + b"x" * 200_000 + b"\n", r"line \d of table .*field larger than"),
        ("a.jsonl", b'{"path": "x.png"}\n{"path": \n', "line 2 of table .* must be JSON"),
        ("a.jsonl", b'["x.png"]\n', "line 1 of table .* must be a JSON object with a text 'path'"),
        ("a.jsonl", b'{"path": 3}\n', "must be a JSON object with a text 'path'"),
        ("a.jsonl", b"[" * 100_000, "line 1 of table .* must be JSON"),
    ],
)
def test_other_tables_are_refused_by_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TableIndex(str(tmp_path / name))


def test_half_a_character_in_a_table_is_a_bad_caption(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"path": "x.png", "caption": "half \\ud83d"}\n')
    with pytest.raises(BadSampleError, match="is not UTF-8 text"):
        TableIndex(str(tmp_path / "a.jsonl"))[0].text()


def test_shards_folders_and_tables_are_one_row(
    folder: Path, write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    table = folder.parent / "list.jsonl"
    _write_table(table)
    shards = [write_shard(f"{i}.tar", make_samples(2, start=2 * i)) for i in range(3)]
    index = open_index([f"{folder.parent}/[01].tar", str(folder), str(table), shards[2]])
    keys = [f"{i:06d}" for i in range(4)] + [
        "b.v1.JPG",
        "deep/a.png",
        "pictures/b.v1.JPG",
        "gone.png",
        "000004",
        "000005",
    ]
    assert [sample.key for sample in index] == keys
    assert index.block_sizes.tolist() == [2, 2, 2, 2, 2]
    assert pickle.loads(pickle.dumps(index))[9].key == "000005"


def test_folder_of_shards_is_refused_with_the_way_out(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    folder = Path(write_shard("0.tar", make_samples(1))).parent
    with pytest.raises(ValueError, match=rf"got directory '{folder}'; write '{folder}/\*\.tar'"):
        open_index([str(folder)])
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder '.*empty' must hold pictures"):
        open_index([f"{folder}/empty"])


def test_two_stars_name_all_depths_and_two_ways_to_one_file_are_refused(
    write_shard: WriteShard, make_samples: MakeSamples
) -> None:
    shards = [Path(write_shard(f"{i}.tar", make_samples(1, start=i))) for i in range(2)]
    root = shards[0].parent
    (root / "deep" / "er").mkdir(parents=True)
    shards[1].rename(root / "deep" / "er" / "1.tar")
    assert [sample.key for sample in open_index([f"{root}/**/*.tar"])] == ["000000", "000001"]
    (root / "link").symlink_to(root / "deep")
    for other in ("deep/../deep/er/1.tar", "link/er/1.tar"):
        with pytest.raises(ValueError, match=r"each shard must be named once, got '.*/deep/er/1\.tar' 2 times"):
            open_index([f"{root}/deep/er/1.tar", f"{root}/{other}"])


def test_damaged_shards_beside_other_sources_are_left_out(folder: Path) -> None:
    bad = folder.parent / "bad.tar"
    bad.write_bytes(b"no tar" * 1000)
    index = open_index([str(bad), str(folder), str(folder.parent / "gone.tar")], skip_damage=True)
    assert [sample.key for sample in index] == ["b.v1.JPG", "deep/a.png"]
    assert [damage.kind for damage in index.damages] == ["shard is no tar", "shard cannot be read"]
    with pytest.raises(ValueError, match=r"shards must hold samples, there are none; the first damage: shard '.*bad"):
        open_index([str(bad)], skip_damage=True)


def test_selection_keeps_order_and_blocks(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    index = open_index([write_shard(f"{i}.tar", make_samples(3, start=3 * i)) for i in range(3)])
    chosen = Selection(index, np.array([0, 2, 7]))
    assert [sample.key for sample in chosen] == ["000000", "000002", "000007"]
    assert chosen.block_sizes.tolist() == [2, 0, 1]
    assert len(chosen) == 3


def test_part_has_its_samples_and_little_else(folder: Path, write_shard: WriteShard, make_samples: MakeSamples) -> None:
    table = folder.parent / "list.jsonl"
    _write_table(table)
    shards = [write_shard(f"{i}.tar", make_samples(4, start=4 * i)) for i in range(3)]
    shards.insert(2, write_shard("empty.tar", []))
    alone, joined = open_index(shards), open_index([*shards, str(folder), str(table)])
    chosen = Selection(joined, np.array([0, 1, 5, 9, 12, 15]))
    for index in (alone, joined, chosen, FolderIndex(str(folder)), TableIndex(str(table))):
        for start in range(len(index)):
            for stop in range(start + 1, len(index) + 1):
                part = pickle.loads(pickle.dumps(index.part(range(start, stop))))
                assert len(part) == stop - start
                for sample, i in zip(part, range(start, stop), strict=True):
                    assert (sample.key, sample.container) == (index[i].key, index[i].container)
                    assert (sample.part(METADATA), sample.part(CAPTION)) == (
                        index[i].part(METADATA),
                        index[i].part(CAPTION),
                    )
    many = open_index([write_shard("many.tar", make_samples(500))])
    assert len(pickle.dumps(many.part(range(7, 9)))) < len(pickle.dumps(many)) / 10


@pytest.mark.parametrize("strings", [[], ["", "a", "", "日本\udcff"], ["x" * 1000]])
def test_packed_strings_are_what_they_were(strings: list[str]) -> None:
    packed = PackedStrings(strings)
    assert [packed[i] for i in range(len(packed))] == strings
    joined = PackedStrings.joined([packed, PackedStrings(["end"]), packed])
    assert [joined[i] for i in range(len(joined))] == [*strings, "end", *strings]


def test_numbers_beyond_the_end_are_refused(folder: Path, write_shard: WriteShard, make_samples: MakeSamples) -> None:
    shard = open_index([write_shard("0.tar", make_samples(2))])
    indexes: list[SampleIndex] = [shard, FolderIndex(str(folder)), Selection(shard, np.array([1]))]
    for index in indexes:
        with pytest.raises(IndexError):
            index[len(index)]
