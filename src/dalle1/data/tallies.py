"""Counters of bounded size: parts of a data set fill some each, which merged in order are those of the whole."""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from dalle1.data.raw_sample import RawSample

_FINEST_BITS = 10  # of a number that tell bins apart: whole numbers below 1,024 have one each
_MOST_BINS = 4096
_SMALLEST, _LARGEST = 2.0**-30, 2.0**64  # nearer to 0 is 0, and further away is this far

_MOST_HASHES = 1 << 20  # 32 MB
_WAITING = 1 << 16

_MOST_TEXTS = 50_000
_LONGEST_TEXT = 200  # characters of a text that are kept

_MOST_FIELDS, _MOST_VALUES, _LONGEST_VALUE = 200, 100, 60
_NUMBERED = re.compile(r"0\d")  # 00012 is a name
_DEEPEST = 3  # objects within objects that are looked into


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A sample that is worth showing."""

    number: int  # in its index, or in the order of a stream
    key: str
    container: str
    note: str = ""
    like: int | None = None  # number of an earlier sample that it is like
    raw: RawSample | None = field(default=None, compare=False, repr=False)  # where it cannot be read again


class Distribution:
    """How numbers are distributed, in bins that are 0.1 to 0.2 % wide; twice as wide each time there are too many.

    Attributes:
        n: How many numbers.
        least: The smallest one.
        most: The largest one.
    """

    def __init__(self) -> None:
        """Of no numbers."""
        self.n = 0
        self.least, self.most = math.inf, -math.inf
        self._bits = _FINEST_BITS
        self._bins: Counter[float] = Counter()  # by their lower ends

    def add(self, number: float) -> None:
        """Count a finite number."""
        self._bins[_lower_end(number, self._bits)] += 1
        self.n += 1
        self.least, self.most = min(self.least, number), max(self.most, number)
        self._widen(self._bits)

    def merge(self, other: Distribution) -> None:
        """Count all that `other` has counted."""
        self._bins.update(other._bins)
        self.n += other.n
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self._widen(min(self._bits, other._bits))

    @property
    def is_one_number(self) -> bool:
        """Whether all numbers are the same."""
        return self.least == self.most

    @property
    def lowest_edge(self) -> float:
        """Where the first bin begins, at the smallest number or a little below it."""
        return min(self._bins)

    def percentile(self, percent: float) -> float:
        """The least number that so many percent of all are not above; lower by less than the width of a bin."""
        wanted = max(1, math.ceil(self.n * percent / 100))
        for end, count in sorted(self._bins.items()):
            wanted -= count
            if wanted <= 0:
                return min(max(end, self.least), self.most)
        return self.most

    def count(self, edges: Sequence[float]) -> list[int]:
        """How many numbers are from each of the ascending edges up to below the next; all above the last with it."""
        counts = [0] * len(edges)
        for end, count in self._bins.items():
            place = bisect_right(edges, end)
            if place:
                counts[place - 1] += count
        return counts

    def _widen(self, bits: int) -> None:
        while bits < self._bits or len(self._bins) > _MOST_BINS:
            self._bits -= 1
            finer, self._bins = self._bins, Counter()
            for end, count in finer.items():
                self._bins[_lower_end(end, self._bits)] += count


def _lower_end(number: float, bits: int) -> float:
    if abs(number) < _SMALLEST:
        return 0.0
    mantissa, exponent = math.frexp(min(max(number, -_LARGEST), _LARGEST))
    return math.ldexp(math.floor(mantissa * (1 << bits)), exponent - bits)


class Examples:
    """Samples by kind: how many there are, and a few of each, those with the lowest values.

    Attributes:
        counts: How many there are of each kind.
    """

    def __init__(self, most: int) -> None:
        """Keep at most so many of each kind."""
        self.counts: Counter[str] = Counter()
        self._most = most
        self._kept: dict[str, list[tuple[float, Mention]]] = {}

    def add(self, kind: str, value: float, mention: Mention) -> None:
        """Count a sample, and keep it if its value is among the lowest, the first of those with one value and note."""
        self.counts[kind] += 1
        self.keep(kind, value, mention)

    def merge(self, other: Examples) -> None:
        """Count and keep what `other` does."""
        self.counts.update(other.counts)
        for kind, kept in other._kept.items():
            for value, mention in kept:
                self.keep(kind, value, mention)

    def of(self, kind: str) -> list[Mention]:
        """The kept samples of a kind, lowest values first."""
        return [mention for _, mention in self._kept.get(kind, [])]

    def keep(self, kind: str, value: float, mention: Mention) -> None:
        """Keep a sample if its value is among the lowest, without counting it."""
        kept = self._kept.setdefault(kind, [])
        is_among_them = len(kept) < self._most or (kept and value <= kept[-1][0])
        if is_among_them and not any(value == other and mention.note == its.note for other, its in kept):
            insort(kept, (value, mention), key=lambda entry: (entry[0], entry[1].number))
            del kept[self._most :]


class Repeats:
    """Which contents come more than once, told apart by 64 bits of their hash.

    Beyond a million different ones only those whose hash ends in a zero bit are counted, then in two and so on, and the
    numbers are estimates.
    """

    def __init__(self) -> None:
        """Of nothing."""
        self._rows = np.empty((0, 4), dtype=np.uint64)  # hash, how often, first and last number; by hash
        self._waiting: list[np.ndarray] = []
        self._new: list[tuple[int, int]] = []
        self._zero_bits = 0

    def add(self, content: bytes, number: int) -> None:
        """Count the content of sample `number`."""
        self._new.append((hash_bits(content), number))

    def merge(self, other: Repeats) -> None:
        """Count all that `other` has counted."""
        other._settle()
        self._waiting.append(other._rows)
        self._zero_bits = max(self._zero_bits, other._zero_bits)
        if sum(map(len, self._waiting)) > max(_WAITING, len(self._rows)):
            self._settle()

    @property
    def is_exact(self) -> bool:
        """Whether everything was counted."""
        self._settle()
        return self._zero_bits == 0

    @property
    def n_distinct(self) -> int:
        """How many different contents there are."""
        self._settle()
        return len(self._rows) << self._zero_bits

    @property
    def n_repeated(self) -> int:
        """How many contents were there before."""
        self._settle()
        return (int(self._rows[:, 1].sum()) - len(self._rows)) << self._zero_bits

    def examples(self, most: int) -> list[tuple[int, int, int]]:
        """How often the most frequent contents come, and the numbers of the first and the last sample with each."""
        self._settle()
        several = self._rows[self._rows[:, 1] > 1].tolist()
        return [(n, first, last) for _, n, first, last in sorted(several, key=lambda row: (-row[1], row[2]))[:most]]

    def _settle(self) -> None:
        if self._new:
            new = np.array([(bits, 1, number, number) for bits, number in self._new], dtype=np.uint64)
            self._waiting.append(new)
            self._new = []
        if not self._waiting:
            return
        rows = np.concatenate([self._rows, *self._waiting])
        self._waiting = []
        rows = rows[rows[:, 0].argsort()]
        _, starts = np.unique(rows[:, 0], return_index=True)
        columns = (np.add.reduceat(rows[:, 1], starts), np.minimum.reduceat(rows[:, 2], starts))
        self._rows = np.stack([rows[starts, 0], *columns, np.maximum.reduceat(rows[:, 3], starts)], axis=1)
        while True:
            self._rows = self._rows[self._rows[:, 0] & np.uint64((1 << self._zero_bits) - 1) == 0]
            if len(self._rows) <= _MOST_HASHES:
                return
            self._zero_bits += 1


def hash_bits(content: bytes) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


class FrequentTexts:
    """Which texts come most often, by their first characters (Misra and Gries 1982).

    Attributes:
        too_low: Each text may have come as many times more often as is counted here; 0 if nothing was left out.
    """

    def __init__(self) -> None:
        """Of nothing."""
        self.too_low = 0
        self._counts: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Count a text."""
        self._counts[text[:_LONGEST_TEXT]] += 1
        self._cut()

    def merge(self, other: FrequentTexts) -> None:
        """Count all that `other` has counted."""
        self._counts.update(other._counts)
        self.too_low += other.too_low
        self._cut()

    def most_frequent(self, most: int) -> list[tuple[str, int]]:
        """Texts that came at least twice, and how often."""
        return [(text, count) for text, count in self._counts.most_common(most) if count > 1]

    def _cut(self) -> None:
        if len(self._counts) <= 2 * _MOST_TEXTS:
            return
        cut = heapq.nlargest(_MOST_TEXTS + 1, self._counts.values())[-1]
        self._counts = Counter({text: count - cut for text, count in self._counts.items() if count > cut})
        self.too_low += cut


class FieldValues:
    """What stands in one field of the metadata.

    Attributes:
        n: How many samples have it.
        kinds: How often it holds text, a number, true or false, null, a list, an object.
        numbers: Its numbers, those in quotes included, which filters take too.
        values: The first different values, as they are written, cut; and how often each comes.
        n_others: How often other values come.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.n = 0
        self.kinds: Counter[str] = Counter()
        self.numbers = Distribution()
        self.values: Counter[str] = Counter()
        self.n_others = 0

    def add(self, value: Any) -> None:
        """Count the value of one sample."""
        self.n += 1
        self.kinds[_kind(value)] += 1
        number = _finite_number(value)
        if number is not None:
            self.numbers.add(number)
        if not isinstance(value, dict | list) and value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            self._count(text[:_LONGEST_VALUE], 1)

    def merge(self, other: FieldValues) -> None:
        """Count all that `other` has counted."""
        self.n += other.n
        self.kinds.update(other.kinds)
        self.numbers.merge(other.numbers)
        self.n_others += other.n_others
        for text, count in other.values.items():
            self._count(text, count)

    def _count(self, text: str, times: int) -> None:
        if text in self.values or len(self.values) < _MOST_VALUES:
            self.values[text] += times
        else:
            self.n_others += times


class Fields:
    """The fields of the metadata; `a.b` is field b of the object a, as filters name it.

    Attributes:
        by_name: The first 200 different fields.
        n_others: How often other fields come.
    """

    def __init__(self) -> None:
        """None yet."""
        self.by_name: dict[str, FieldValues] = {}
        self.n_others = 0

    def add(self, metadata: Mapping[str, Any], prefix: str = "", depth: int = 1) -> None:
        """Count the fields of one sample."""
        for name, value in islice(metadata.items(), _MOST_FIELDS):
            if isinstance(value, dict) and value and depth < _DEEPEST:
                self.add(value, f"{prefix}{name}.", depth + 1)
            elif (values := self._field(prefix + name)) is None:
                self.n_others += 1
            else:
                values.add(value)
        self.n_others += max(0, len(metadata) - _MOST_FIELDS)

    def merge(self, other: Fields) -> None:
        """Count all that `other` has counted."""
        self.n_others += other.n_others
        for name, its in other.by_name.items():
            values = self._field(name)
            if values is None:
                self.n_others += its.n
            else:
                values.merge(its)

    def _field(self, name: str) -> FieldValues | None:
        if name not in self.by_name and len(self.by_name) >= _MOST_FIELDS:
            return None
        return self.by_name.setdefault(name, FieldValues())


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "text", int: "number", float: "number", list: "list", dict: "object"}
    return kinds.get(type(value), "null")


def _finite_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and _NUMBERED.match(value):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
