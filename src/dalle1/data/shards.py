"""Random access to the captioned pictures of local tar shards.

`expand_shards` turns patterns into paths; `ShardIndex` reads every tar header once and then fetches members
by their byte range. A sample is `key.jpg` (or `.jpeg`, `.png`, `.webp`), `key.txt` with the caption and, if
present, `key.json` with anything else: the layout that img2dataset writes. As in WebDataset, the key is the
member's directory and its file name up to the first dot. Nothing is unpacked to disk, unpickled or executed.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial

import numpy as np
from braceexpand import braceexpand

from dalle1.data.raw_sample import RawSample
from dalle1.data.sample_index import PackedStrings, SampleIndex
from dalle1.data.shard_cache import read_shards
from dalle1.data.shard_scan import ABSENT

# Far below the usual limit of 1024 open files per process.
MAX_OPEN_SHARDS = 256


def expand_shards(patterns: str | list[str], *, missing_ok: bool = False) -> list[str]:
    """Paths of the shards that `patterns` name: each a path, a glob, whose matches are sorted, or either with braces.

    `a-{000..041}.tar` are 42 names, `{a,b}.tar` two, as in a shell; each of them must be there, unless `missing_ok`.

    Raises: TypeError if it is neither a string nor a list of strings; ValueError for addresses, pipes,
        directories, braces without their partners and shards named twice; FileNotFoundError for a pattern without a
        match.
    """
    listed = shard_patterns(patterns)
    shards = [shard for pattern in listed for name in expand_braces(pattern) for shard in _expand(name, missing_ok)]
    if not shards:
        raise ValueError("shards must name at least one tar file, got an empty list")
    check_distinct(shards)
    return shards


def check_distinct(paths: Sequence[str]) -> None:
    """Raise ValueError if two paths lead to the same file, or two addresses are the same."""
    places = (path if _is_elsewhere(path) else os.path.realpath(path) for path in paths)
    for path, count in Counter(places).items():
        if count > 1:
            raise ValueError(f"each shard must be named once, got {path!r} {count} times; make the patterns disjoint")


def _is_elsewhere(path: str) -> bool:
    return path.startswith("pipe:") or "://" in path


def shard_patterns(patterns: str | list[str]) -> list[str]:
    """One or several patterns as a list.

    Raises: TypeError if `patterns` is neither a string nor a list of strings.
    """
    listed = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(listed, list) or not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"shards must be a path, a glob or a list of them, got {patterns!r}")
    return listed


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that a range or list in braces stands for; a file of that very name is itself.

    Raises: ValueError for braces without their partners.
    """
    if os.path.exists(pattern):  # a file may be called anything
        yield pattern
        return
    try:
        # Without escapes: a backslash is part of a path on Windows.
        yield from braceexpand(pattern, escape=False)
    except ValueError as error:
        raise ValueError(f"shards must have as many {{ as }} in their name, got {pattern!r}; correct it") from error


def _expand(pattern: str, missing_ok: bool) -> list[str]:
    if _is_elsewhere(pattern):
        raise ValueError(f"shards must be local tar files, got {pattern!r}; download them and give their path")
    if pattern.endswith("/") or os.path.isdir(pattern):
        raise ValueError(f"shards must be tar files, got directory {pattern!r}; write '{pattern.rstrip('/')}/*.tar'")
    shards = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not shards and missing_ok and glob.escape(pattern) == pattern:
        return [pattern]
    if not shards:
        raise FileNotFoundError(f"no shards match {pattern!r}; correct the path, or make or download the data first")
    return shards


class ShardIndex(SampleIndex):
    """The samples of local tar shards, in the order of the shards and of their members.

    Building it reads all tar headers, unless they are remembered (`shard_cache`), but no content. In memory a sample
    takes its key and 72 bytes.
    """

    def __init__(self, patterns: str | list[str], *, skip_damage: bool = False, may_be_empty: bool = False) -> None:
        """Scan the shards that `patterns` name (see `expand_shards`).

        Args:
            patterns: Which shards.
            skip_damage: Take what is whole of damaged shards and note in `damages` what is wrong with them; that a
                shard is missing is damage too. Without, damage is an error.
            may_be_empty: Do with no sample at all, if that is for damage.

        Raises:
            ValueError: If there is no sample at all; for a file that is no complete tar, for a key with two pictures,
                captions or JSON files and for a name that leads out of the shard; all that `expand_shards` raises.
        """
        self.shards = expand_shards(patterns, missing_ok=skip_damage)
        self.damages = []
        keys, byte_ranges = [], []
        self.states: list[tuple[int, int]] = []  # size and time of change of each, when it was scanned
        for content in read_shards(self.shards):
            if content.damages and not skip_damage:
                raise ValueError(
                    f"{content.damages[0].message}, or set on_bad_sample=skip (data.on_bad_sample=skip of train.py)"
                )
            self.damages += content.damages
            self.states.append(content.state)
            keys.append(PackedStrings(content.keys))
            byte_ranges.append(content.byte_ranges)
        self._keys = PackedStrings.joined(keys)
        if not self._keys and self.damages and not may_be_empty:
            raise ValueError(f"shards must hold samples, there are none; the first damage: {self.damages[0].message}")
        if not self._keys and not self.damages:
            raise ValueError(f"shards must hold samples, such as 01.jpg and 01.txt; there are none in {patterns!r}")
        self.block_sizes = np.array([len(part) for part in keys], dtype=np.int64)
        self._ends = np.cumsum(self.block_sizes)
        self._byte_ranges = np.concatenate(byte_ranges)  # (samples, parts, offset and size)

    def __getitem__(self, i: int) -> RawSample:
        """See `SampleIndex`; the key is unique within its shard."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        return RawSample(key=self._keys[i], container=self.shards[number], read_part=partial(self._fetch, number, i))

    def part(self, numbers: range) -> SampleIndex:
        """See `SampleIndex`."""
        first, last = np.searchsorted(self._ends, [numbers.start, numbers.stop - 1], side="right").tolist()
        part = copy(self)
        part.shards, part.states = self.shards[first : last + 1], self.states[first : last + 1]
        part._ends = np.minimum(self._ends[first : last + 1], numbers.stop) - numbers.start
        part.block_sizes = np.diff(part._ends, prepend=0)
        part._keys = self._keys.part(numbers)
        part._byte_ranges = self._byte_ranges[numbers.start : numbers.stop]
        part.damages = []
        return part

    def _fetch(self, shard_number: int, i: int, part: int, n_bytes: int) -> bytes | None:
        offset, size = self._byte_ranges[i, part].tolist()
        if (offset, size) == ABSENT:
            return None
        size = min(size, n_bytes)
        # A positional read shares no file offset, so descriptors inherited by a fork stay correct.
        data = os.pread(_descriptor(self.shards[shard_number], self.states[shard_number]), size, offset)
        if len(data) < size:
            raise OSError("the shard became shorter while in use")
        return data


# Descriptors of this process by path and state of the shard, least recently used first: one limit for all indexes.
_open_files: dict[tuple[str, tuple[int, int] | None], int] = {}


def _descriptor(shard: str, state: tuple[int, int] | None) -> int:
    """The shard opened for reading. Raises: OSError if it cannot be, or is not in this `state` any more."""
    descriptor = _open_files.pop((shard, state), None)
    if descriptor is None:
        descriptor = os.open(shard, os.O_RDONLY)
        facts = os.fstat(descriptor)
        if (facts.st_size, facts.st_mtime_ns) != state:
            os.close(descriptor)
            raise OSError("the shard was changed while in use")  # its byte ranges may be those of other samples
    _open_files[shard, state] = descriptor
    if len(_open_files) > MAX_OPEN_SHARDS:
        os.close(_open_files.pop(next(iter(_open_files))))
    return descriptor
