"""Captioned pictures under numbers: what every place that holds some offers, and how places are joined and thinned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dalle1.data.raw_sample import RawSample
from dalle1.data.shard_scan import Damage


class PackedStrings:
    """Many strings in two arrays: eight bytes more than their text each, and none that a forked process must copy.

    Strings of Python count who refers to them, so that reading a list of millions in loader workers copies it.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Keep `strings`; file names of any bytes come back as they were."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def joined(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        """The strings of all parts."""
        whole = cls([])
        starts = np.cumsum([0, *(len(part._text) for part in parts)])
        ends = [part._ends + start for part, start in zip(parts, starts, strict=False)]
        whole._ends = np.concatenate([whole._ends, *ends])
        whole._text = np.concatenate([whole._text, *(part._text for part in parts)])
        return whole

    def part(self, numbers: range) -> PackedStrings:
        """The strings with these numbers, at least one."""
        start = int(self._ends[numbers.start - 1]) if numbers.start else 0
        part = PackedStrings([])
        part._ends = self._ends[numbers.start : numbers.stop] - start
        part._text = self._text[start : start + int(part._ends[-1])]
        return part

    def __len__(self) -> int:
        """Number of strings."""
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        """String number `i`. Raises: IndexError if there is none."""
        start = int(self._ends[i - 1]) if i else 0
        return self._text[start : int(self._ends[i])].tobytes().decode("utf-8", "surrogatepass")


class SampleIndex(ABC):
    """Samples under the numbers from 0; it can be pickled and used after a fork.

    Attributes:
        block_sizes: Numbers of samples that are cheap to read one after the other, in their order, int64 (blocks,).
        damages: What is wrong with the shards it reads from, where that is no error.
    """

    block_sizes: np.ndarray
    damages: list[Damage]

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.block_sizes.sum())

    def __iter__(self) -> Iterator[RawSample]:
        """The samples in their order."""
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def __getitem__(self, i: int) -> RawSample:
        """Sample number `i`, in [0, len); nothing of it is read yet."""

    @abstractmethod
    def part(self, numbers: range) -> SampleIndex:
        """The samples with these numbers, at least one, under the numbers from 0: small enough to be sent anywhere."""


class JoinedIndex(SampleIndex):
    """The samples of several indexes, one after the other."""

    def __init__(self, parts: Sequence[SampleIndex]) -> None:
        """Join `parts`, at least one."""
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.block_sizes = np.concatenate([part.block_sizes for part in parts])
        self.damages = [damage for part in parts for damage in part.damages]

    def __getitem__(self, i: int) -> RawSample:
        """See `SampleIndex`."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        return self._parts[number][i - (int(self._ends[number - 1]) if number else 0)]

    def part(self, numbers: range) -> SampleIndex:
        """See `SampleIndex`."""
        parts, start = [], 0
        for each in self._parts:
            inside = range(max(numbers.start - start, 0), min(numbers.stop - start, len(each)))
            parts += [each.part(inside)] if inside else []
            start += len(each)
        return JoinedIndex(parts)


class Selection(SampleIndex):
    """Some samples of an index, in its order."""

    def __init__(self, index: SampleIndex, numbers: np.ndarray) -> None:
        """Keep the samples with these `numbers`, int64 (kept,) and ascending."""
        self._index = index
        self._numbers = numbers
        edges = np.searchsorted(numbers, np.cumsum([0, *index.block_sizes]))
        self.block_sizes = np.diff(edges)
        self.damages = index.damages

    def __getitem__(self, i: int) -> RawSample:
        """See `SampleIndex`."""
        return self._index[int(self._numbers[i])]

    def part(self, numbers: range) -> SampleIndex:
        """See `SampleIndex`."""
        chosen = self._numbers[numbers.start : numbers.stop]
        first = int(chosen[0])
        return Selection(self._index.part(range(first, int(chosen[-1]) + 1)), chosen - first)
