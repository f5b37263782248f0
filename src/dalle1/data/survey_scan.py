"""A whole data set is looked at: an index in several processes if that pays, or shards from beginning to end."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import islice

import numpy as np
from tqdm import tqdm

from dalle1.data.near_duplicates import near_duplicates
from dalle1.data.processes import map_parts, n_usable_cores
from dalle1.data.raw_sample import RawSample
from dalle1.data.remote import read_shard
from dalle1.data.sample_index import SampleIndex
from dalle1.data.survey import MOST_SHOWN, NEAR_DUPLICATE, Survey, SurveyOptions, Surveyor, chance
from dalle1.data.tallies import Mention

_PART = 1000  # samples that a process looks at before it reports
_LEAST_PART = 50
# So long this process works alone, and then knows how long it would take; another one needs so long to start.
_SECONDS_ALONE, _SECONDS_WORTH_A_PROCESS = 1.0, 5.0


def survey_index(index: SampleIndex, options: SurveyOptions, *, num_workers: int | None = None) -> Survey:
    """Look at all samples of an index.

    Args:
        index: The samples.
        options: What to look at.
        num_workers: Processes that do it, 0 for this one; None for as many as are worth their start.

    Raises: ValueError if a process ends before its work.
    """
    survey = Survey.empty(options)
    for damage in index.damages:
        survey.note(damage)
    size = min(_PART, max(_LEAST_PART, len(index) // 64))
    parts = [range(start, min(start + size, len(index))) for start in range(0, len(index), size)]
    with tqdm(total=len(index), desc="inspecting", unit=" samples", unit_scale=True, disable=None) as bar:
        for part in _surveyed(_IndexSurveyor(index, options), parts, num_workers):
            survey.merge(part)
            bar.update(part.n_samples)
    if options.filters.near_duplicates is not None:
        _drop_near_duplicates(survey, index, options)
    return survey


def survey_stream(shards: Sequence[str], options: SurveyOptions) -> Survey:
    """Look at all samples of shards that are read from beginning to end, see `remote.read_shard`.

    Of each shard the first pictures are decoded, of all together as many as are wanted.

    Raises: ValueError for near-duplicates, whose pictures would have to be read twice, and as `read_shard`.
    """
    if options.filters.near_duplicates is not None:
        raise ValueError(
            "filters.near_duplicates must be null for shards that are read from beginning to end, got "
            f"{options.filters.near_duplicates}; copy them here, or set it to null"
        )
    survey = Survey.empty(options)
    surveyor = Surveyor(options, keeps_raw=True)
    with tqdm(desc="inspecting", unit=" samples", unit_scale=True, disable=None) as bar:
        for place, shard in enumerate(shards):
            bar.set_postfix_str(f"shard {place + 1:,} of {len(shards):,}")
            n_decoded = None if options.decode is None else -(-options.decode // len(shards))
            samples = _numbered(read_shard(shard, survey.note), survey.n_samples, n_decoded)
            while (part := surveyor(islice(samples, _LEAST_PART))).n_samples:
                survey.merge(part)
                bar.update(part.n_samples)
    return survey


def _numbered(samples: Iterable[RawSample], first: int, n_decoded: int | None) -> Iterator[tuple[int, RawSample, bool]]:
    for place, raw in enumerate(samples):
        yield first + place, raw, n_decoded is None or place < n_decoded


class _IndexSurveyor:
    """Looks at samples of an index by their numbers."""

    def __init__(self, index: SampleIndex, options: SurveyOptions) -> None:
        self._index = index
        self._first = 0  # number of the first sample of `index`
        self._n_samples = len(index)
        self._n_decoded = len(index) if options.decode is None else min(options.decode, len(index))
        self._surveyor = Surveyor(options)

    def part(self, numbers: range) -> _IndexSurveyor:
        part = copy(self)
        part._index, part._first = self._index.part(numbers), numbers.start
        return part

    def __call__(self, numbers: Iterable[int]) -> Survey:
        return self._surveyor((number, self._index[number - self._first], self._decodes(number)) for number in numbers)

    def _decodes(self, number: int) -> bool:
        """True for so many numbers, as far from each other as can be."""
        return number * self._n_decoded // self._n_samples != (number + 1) * self._n_decoded // self._n_samples


def _surveyed(surveyor: _IndexSurveyor, parts: list[range], num_workers: int | None) -> Iterator[Survey]:
    """What there is to say of each part, in order."""
    if num_workers is None:
        n_done, started = 0, time.monotonic()
        while n_done < len(parts) and time.monotonic() - started < _SECONDS_ALONE:
            yield surveyor(parts[n_done])
            n_done += 1
        seconds_left = (time.monotonic() - started) / n_done * (len(parts) - n_done)
        num_workers = min(n_usable_cores(), int(seconds_left / _SECONDS_WORTH_A_PROCESS))
        parts = parts[n_done:]
    yield from map_parts(surveyor, parts, num_workers)


def _drop_near_duplicates(survey: Survey, index: SampleIndex, options: SurveyOptions) -> None:
    """Count the pictures that are like an earlier one, and find that one for those that are shown."""
    distance = options.filters.near_duplicates
    assert distance is not None, "only called with that filter"
    numbers = np.frombuffer(survey.hashed, dtype=np.uint64)
    hashes = np.frombuffer(survey.hashes, dtype=np.uint64)
    is_later = near_duplicates(hashes, distance)
    later = np.flatnonzero(is_later).tolist()
    if later:
        survey.dropped.counts[NEAR_DUPLICATE] = len(later)
    chances = {place: chance(options.seed, int(numbers[place])) for place in later}
    for place in heapq.nsmallest(MOST_SHOWN, later, key=chances.__getitem__):
        is_near = np.bitwise_count(hashes[:place] ^ hashes[place]) <= distance
        first = int(np.flatnonzero(is_near & ~is_later[:place])[0])
        raw, like = index[int(numbers[place])], int(numbers[first])
        mention = Mention(
            number=int(numbers[place]), key=raw.key, container=raw.container, note=NEAR_DUPLICATE, like=like
        )
        survey.dropped.keep(NEAR_DUPLICATE, chances[place], mention)
