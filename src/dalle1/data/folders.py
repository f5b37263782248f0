"""Captioned pictures that are not in shards: folders of files, and tables of paths and captions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dalle1.data.raw_sample import CAPTION, METADATA, PICTURE, PICTURE_EXTENSIONS, RawSample
from dalle1.data.sample_index import PackedStrings, SampleIndex
from dalle1.data.sampled_picture import MANIFEST_NAME, PICTURE_NAME

TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl")
PATH_COLUMN, CAPTION_COLUMN = "path", "caption"
# Shuffling in windows needs blocks; files that are listed one after the other mostly lie so.
_BLOCK = 1000


def pictures_below(folder: str) -> list[str]:
    """Paths of the picture files in a folder, at any depth and sorted; hidden ones are passed over.

    Raises: FileNotFoundError if there are none; OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for directory, subfolders, names in os.walk(folder, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        sampled = [name for name in names if PICTURE_NAME.fullmatch(name)]
        if MANIFEST_NAME in names and sampled:  # a run of sample.py: its pictures, not the grids of them
            names = sampled
        names = [name for name in names if name.lower().endswith(PICTURE_EXTENSIONS) and not name.startswith(".")]
        found += [os.path.join(directory, name) for name in names]
    if not found:
        raise FileNotFoundError(f"folder {folder!r} must hold pictures ({', '.join(PICTURE_EXTENSIONS)}), it has none")
    return sorted(found)


def _blocks_of(n_samples: int) -> np.ndarray:
    return np.diff([*range(0, n_samples, _BLOCK), n_samples]).astype(np.int64)


class FolderIndex(SampleIndex):
    """The pictures in a folder, at any depth and sorted by path.

    The caption of `a/b.jpg` is `a/b.txt`, and `a/b.json` has anything else. Its key is `a/b.jpg`.
    """

    def __init__(self, folder: str) -> None:
        """List `folder`; no file is read. Raises: as `pictures_below`."""
        self._folder = folder
        self._names = PackedStrings(os.path.relpath(path, folder) for path in pictures_below(folder))
        self.block_sizes = _blocks_of(len(self._names))
        self.damages = []

    def __getitem__(self, i: int) -> RawSample:
        """See `SampleIndex`."""
        name = self._names[i]
        return RawSample(key=name, container=self._folder, read_part=partial(_read_beside, Path(self._folder, name)))

    def part(self, numbers: range) -> SampleIndex:
        """See `SampleIndex`."""
        part = copy(self)
        part._names = self._names.part(numbers)
        part.block_sizes = _blocks_of(len(numbers))
        return part


def _read_beside(picture: Path, part: int, n_bytes: int) -> bytes | None:
    """A part of the sample that a picture file is the picture of."""
    extension = {CAPTION: ".txt", METADATA: ".json"}.get(part)
    path = picture if part == PICTURE else picture.with_suffix(extension) if extension else None
    if path is None or (part != PICTURE and not path.is_file()):
        return None
    return _read_file(path, n_bytes)


def _read_file(path: Path, n_bytes: int) -> bytes:
    if not path.is_file() and path.exists():  # opening a pipe would wait for its other end
        raise OSError(f"'{path}' is no file")
    with path.open("rb") as file:
        return file.read(n_bytes)


class TableIndex(SampleIndex):
    """The rows of a CSV (or TSV) file with a header, or the objects of a JSONL file, one in each line.

    `path` is the picture's, from the table's folder; `caption` is the caption. Everything else is metadata, as what
    stands in a sample's `.json` is. The key is the path.
    """

    def __init__(self, table: str) -> None:
        """Read the table; no picture is.

        Raises: ValueError if it is no such table; OSError if it cannot be read.
        """
        self._table = table
        keys, rows = [], []
        try:
            for row in _json_rows(table) if table.lower().endswith(".jsonl") else _csv_rows(table):
                keys.append(str(row[PATH_COLUMN]))
                rows.append(json.dumps(row))  # in a fifth of the memory
        except UnicodeDecodeError as error:
            raise ValueError(f"table {table!r} must be UTF-8 text, it is not ({error}); convert it") from error
        if not rows:
            raise ValueError(f"table {table!r} must have rows, it has none")
        self._keys, self._rows = PackedStrings(keys), PackedStrings(rows)
        self.block_sizes = _blocks_of(len(rows))
        self.damages = []

    def __getitem__(self, i: int) -> RawSample:
        """See `SampleIndex`."""
        return RawSample(key=self._keys[i], container=self._table, read_part=partial(self._read, i))

    def part(self, numbers: range) -> SampleIndex:
        """See `SampleIndex`."""
        part = copy(self)
        part._keys, part._rows = self._keys.part(numbers), self._rows.part(numbers)
        part.block_sizes = _blocks_of(len(numbers))
        return part

    def _read(self, i: int, part: int, n_bytes: int) -> bytes | None:
        if part == PICTURE:
            return _read_file(Path(self._table).parent / self._keys[i], n_bytes)
        if part == METADATA:
            return self._rows[i].encode()[:n_bytes]
        caption = json.loads(self._rows[i]).get(CAPTION_COLUMN) if part == CAPTION else None
        return caption.encode("utf-8", "surrogatepass")[:n_bytes] if isinstance(caption, str) else None


def _csv_rows(table: str) -> Iterator[dict[str, Any]]:
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter="\t" if table.lower().endswith(".tsv") else ",")
        try:
            if PATH_COLUMN not in (reader.fieldnames or []):
                raise ValueError(
                    f"table {table!r} must have a column '{PATH_COLUMN}' (and '{CAPTION_COLUMN}') in its first line, "
                    f"got {', '.join(reader.fieldnames or []) or 'nothing'}"
                )
            for row in reader:
                if None in row or row[PATH_COLUMN] in (None, ""):
                    raise ValueError(
                        f"line {reader.line_num} of table {table!r} must have a {PATH_COLUMN} and as many fields as "
                        "the first line; quote fields that contain the separator"
                    )
                yield {name: value for name, value in row.items() if value is not None}
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of table {table!r} cannot be read ({error}); mend it") from error


def _json_rows(table: str) -> Iterator[dict[str, Any]]:
    with open(table, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of table {table!r} must be JSON, it is not ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get(PATH_COLUMN), str) or not row[PATH_COLUMN]:
                raise ValueError(f"line {number} of table {table!r} must be a JSON object with a text '{PATH_COLUMN}'")
            yield row
