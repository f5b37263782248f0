"""Random access to the captioned pictures of local tar shards.

`expand_shards` turns patterns into paths; `ShardIndex` reads every tar header once and then fetches members
by their byte range. A sample is `key.jpg` (or `.jpeg`, `.png`, `.webp`), `key.txt` with the caption and, if
present, `key.json` with anything else: the layout that img2dataset writes. As in WebDataset, the key is the
member's directory and its file name up to the first dot. Nothing is unpacked to disk, unpickled or executed.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from braceexpand import braceexpand

from dalle1.data.shard_cache import read_shards
from dalle1.data.shard_scan import ABSENT, CAPTION, METADATA, PICTURE

# Far below the usual limit of 1024 open files per process.
MAX_OPEN_SHARDS = 64


class BadSampleError(ValueError):
    """A sample that cannot be used. The message is one sentence that names its key and its shard."""

    def __init__(self, message: str, kind: str = "unusable sample") -> None:
        """`kind` says in a few words what is wrong; bad samples are counted by it."""
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample as it lies in its shard; `image` is the undecoded picture file."""

    key: str
    shard: str
    image: bytes
    caption: str
    metadata: dict[str, Any]


def expand_shards(patterns: str | list[str]) -> list[str]:
    """Paths of the shards that `patterns` name: each a path, a glob, whose matches are sorted, or either with braces.

    `a-{000..041}.tar` are 42 names, `{a,b}.tar` two, as in a shell; each of them must be there.

    Raises: TypeError if it is neither a string nor a list of strings; ValueError for addresses, pipes,
        directories, braces without their partners and shards named twice; FileNotFoundError for a pattern without a
        match.
    """
    listed = shard_patterns(patterns)
    shards = [shard for pattern in listed for part in _expand_braces(pattern) for shard in _expand(part)]
    if not shards:
        raise ValueError("shards must name at least one tar file, got an empty list")
    for shard, count in Counter(shards).items():
        if count > 1:
            raise ValueError(f"each shard must be named once, got {shard!r} {count} times; make the patterns disjoint")
    return shards


def shard_patterns(patterns: str | list[str]) -> list[str]:
    """One or several patterns as a list.

    Raises: TypeError if `patterns` is neither a string nor a list of strings.
    """
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, list) or not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"shards must be a path, a glob or a list of them, got {patterns!r}")
    return listed


def _expand_braces(pattern: str) -> Iterator[str]:
    if os.path.exists(pattern):  # a file may be called anything
        yield pattern
        return
    try:
        # Without escapes: a backslash is part of a path on Windows.
        yield from braceexpand(pattern, escape=False)
    except ValueError as error:
        raise ValueError(f"shards must have as many {{ as }} in their name, got {pattern!r}; correct it") from error


def _expand(pattern: str) -> list[str]:
    if pattern.startswith("pipe:") or "://" in pattern:
        raise ValueError(f"shards must be local tar files, got {pattern!r}; download them and give their path")
    if pattern.endswith("/") or os.path.isdir(pattern):
        raise ValueError(f"shards must be tar files, got directory {pattern!r}; write '{pattern.rstrip('/')}/*.tar'")
    shards = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    if not shards:
        raise FileNotFoundError(f"no shards match {pattern!r}; correct the path, or make or download the data first")
    return shards


class ShardIndex:
    """The samples of local tar shards, numbered from 0 in the order of the shards and of their members.

    Building it reads all tar headers, unless they are remembered (`shard_cache`), but no content. It can be pickled and
    used after a fork.
    """

    def __init__(self, patterns: str | list[str]) -> None:
        """Scan the shards that `patterns` name (see `expand_shards`).

        Raises: ValueError for a file that is no complete tar, for a key with two pictures, captions or JSON
            files, and if there is no sample at all; all that `expand_shards` raises.
        """
        # Descriptors by shard number, least recently used first.
        self._open_files: dict[int, int] = {}
        self.shards = expand_shards(patterns)
        self._keys: list[str] = []
        shard_numbers, byte_ranges = [], []
        for number, content in enumerate(read_shards(self.shards)):
            self._keys.extend(content.keys)
            shard_numbers.append(np.full(len(content.keys), number, dtype=np.int64))
            byte_ranges.append(content.byte_ranges)
        if not self._keys:
            raise ValueError(f"shards must hold samples, such as 01.jpg and 01.txt; there are none in {patterns!r}")
        self._shard_numbers = np.concatenate(shard_numbers)
        self._byte_ranges = np.concatenate(byte_ranges)  # (samples, 3 parts, offset and size)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the open files, which mean nothing to another process."""
        return self.__dict__ | {"_open_files": {}}

    def __del__(self) -> None:
        """Close the shards."""
        for descriptor in self._open_files.values():
            os.close(descriptor)

    def key(self, i: int) -> str:
        """Key of sample `i`; unique within its shard."""
        return self._keys[i]

    def shard(self, i: int) -> str:
        """Path of the shard that holds sample `i`."""
        return self.shards[int(self._shard_numbers[i])]

    def describe(self, i: int) -> str:
        """Words that find sample `i` again, for messages."""
        return f"sample {self.key(i)!r} in {self.shard(i)!r}"

    def image(self, i: int) -> bytes:
        """The undecoded picture file of sample `i`.

        Raises: BadSampleError if it has none.
        """
        data = self._fetch(i, PICTURE)
        if data is None:
            raise BadSampleError(f"{self.describe(i)} has no picture (.jpg, .jpeg, .png or .webp)", "no picture")
        return data

    def has_caption(self, i: int) -> bool:
        """Whether sample `i` has a caption, good or bad."""
        return tuple(self._byte_ranges[i, CAPTION].tolist()) != ABSENT

    def caption(self, i: int) -> str:
        """Caption of sample `i`, without white space around it; may be empty.

        Raises: BadSampleError if there is none or it is not UTF-8.
        """
        data = self._fetch(i, CAPTION)
        if data is None:
            raise BadSampleError(f"{self.describe(i)} has no caption (.txt)", "no caption")
        try:
            return data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            message = f"caption of {self.describe(i)} is not UTF-8 text ({error})"
            raise BadSampleError(message, "caption not UTF-8") from error

    def metadata(self, i: int) -> dict[str, Any]:
        """The `.json` of sample `i`; empty if it has none.

        Raises: BadSampleError if it is not a JSON object.
        """
        data = self._fetch(i, METADATA)
        if data is None:
            return {}
        try:
            metadata = json.loads(data)
        except ValueError as error:
            raise BadSampleError(f"metadata of {self.describe(i)} is not JSON ({error})") from error
        if not isinstance(metadata, dict):
            raise BadSampleError(f"metadata of {self.describe(i)} must be a JSON object, got {type(metadata).__name__}")
        return metadata

    def read(self, i: int) -> RawSample:
        """All of sample `i`.

        Raises: BadSampleError as `image`, `caption` and `metadata` do.
        """
        return RawSample(
            key=self.key(i),
            shard=self.shard(i),
            image=self.image(i),
            caption=self.caption(i),
            metadata=self.metadata(i),
        )

    def captions(self) -> Iterator[str]:
        """The captions of all samples in their order; no picture is read.

        Raises: BadSampleError as `caption` does.
        """
        return (self.caption(i) for i in range(len(self)))

    def _fetch(self, i: int, part: int) -> bytes | None:
        offset, size = self._byte_ranges[i, part].tolist()
        if (offset, size) == ABSENT:
            return None
        # A positional read shares no file offset, so descriptors inherited by a fork stay correct.
        data = os.pread(self._descriptor(int(self._shard_numbers[i])), size, offset)
        if len(data) < size:
            raise OSError(f"shard {self.shard(i)!r} became shorter while in use; restore it and start again")
        return data

    def _descriptor(self, shard_number: int) -> int:
        if shard_number in self._open_files:
            descriptor = self._open_files.pop(shard_number)
        else:
            descriptor = os.open(self.shards[shard_number], os.O_RDONLY)
        self._open_files[shard_number] = descriptor
        if len(self._open_files) > MAX_OPEN_SHARDS:
            os.close(self._open_files.pop(next(iter(self._open_files))))
        return descriptor
