"""Which samples of an index filters keep: found out before training, so that an epoch has a length and an order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.data.captions import CaptionSource
from dalle1.data.facts import read_facts
from dalle1.data.filters import RULES_VERSION, FilterConfig, reason_to_drop
from dalle1.data.near_duplicates import hash_file, near_duplicates
from dalle1.data.processes import map_parts, n_usable_cores
from dalle1.data.raw_sample import CANNOT_BE_READ
from dalle1.data.sample_index import SampleIndex, Selection
from dalle1.data.shard_cache import cache_directory, is_settled
from dalle1.data.shards import ShardIndex

logger = logging.getLogger(__name__)

_NEAR_DUPLICATE = "near-duplicate"
# About as many samples are looked at in the time that another process needs to start.
_SAMPLES_WORTH_A_PROCESS, _PICTURES_WORTH_A_PROCESS = 20_000, 2_000
_PART = 1000  # samples that a process looks at before it reports


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What is left of an index."""

    index: SampleIndex
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> samples


def filter_index(index: SampleIndex, config: FilterConfig, caption: CaptionSource) -> Filtered:
    """The samples that `config` keeps; which ones these are is remembered for shards that do not change.

    Several processes that want to know the same wait for the one that finds it out.

    Raises: ValueError if none is left.
    """
    if not config.is_active:
        return Filtered(index=index)
    reason_to_drop(config)  # what it needs and is not there is told here, not by some process
    path = _cache_path(index, config, caption)
    with _alone(path):
        verdicts = None if path is None else _recall(path, len(index))
        if verdicts is None:
            verdicts, is_sure = _judge(index, config, caption, n_at_once=1 if path else _n_devices_here())
            if path is not None and is_sure:
                _remember(path, verdicts)
    names, codes = verdicts
    counts = np.bincount(codes, minlength=len(names) + 1)
    dropped = Counter({name: int(count) for name, count in zip(names, counts[1:], strict=True)})
    kept = np.flatnonzero(codes == 0)
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.most_common())
    if not len(kept):
        raise ValueError(f"filters must keep at least one sample, got none of {len(index):,}: {reasons}; loosen them")
    logger.info("filters keep %s of %s samples: %s", f"{len(kept):,}", f"{len(index):,}", reasons or "all")
    return Filtered(index=Selection(index, kept), dropped=dropped)


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """Only one process at a time finds out what is remembered at `path`; without a place to remember each does."""
    try:
        if path is None:
            raise OSError
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


_Verdicts = tuple[list[str], np.ndarray]  # reasons; of each sample 0 if it is kept, or 1 + the number of its reason


def _n_devices_here() -> int:
    """How many processes like this one may be at the same work on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def _judge(
    index: SampleIndex, config: FilterConfig, caption: CaptionSource, *, n_at_once: int
) -> tuple[_Verdicts, bool]:
    """The verdicts, and whether they will be the same next time: all that is there could be read."""
    is_sure = True
    codes = np.zeros(len(index), dtype=np.uint8)
    names: list[str] = []
    hashes = np.zeros(len(index), dtype=np.uint64)
    has_hash = np.zeros(len(index), dtype=bool)
    parts = [range(start, min(start + _PART, len(index))) for start in range(0, len(index), _PART)]
    with tqdm(total=len(index), desc="filtering", unit=" samples", unit_scale=True, delay=1.0, disable=None) as bar:
        for numbers, (reasons, found, could_read) in zip(
            parts, _judged(index, config, caption, parts, n_at_once), strict=True
        ):
            for number, reason in reasons.items():
                if reason not in names:
                    names.append(reason)
                codes[number] = 1 + names.index(reason)
            hashes[list(found)] = list(found.values())
            has_hash[list(found)] = True
            is_sure &= could_read
            bar.update(len(numbers))
    if config.needs_pixels and config.near_duplicates is not None:
        numbers_with_hash = np.flatnonzero(has_hash)
        later = near_duplicates(hashes[numbers_with_hash], config.near_duplicates)
        names.append(_NEAR_DUPLICATE)
        codes[numbers_with_hash[later]] = len(names)
    return (names, codes), is_sure


# By numbers: reasons to drop, and hashes of those that stay; and whether all could be read.
_Part = tuple[dict[int, str], dict[int, int], bool]


def _judged(
    index: SampleIndex, config: FilterConfig, caption: CaptionSource, parts: list[range], n_at_once: int
) -> Iterator[_Part]:
    """What there is to say of each part, in order."""
    worth = _PICTURES_WORTH_A_PROCESS if config.needs_pixels else _SAMPLES_WORTH_A_PROCESS
    n_processes = min(n_usable_cores() // n_at_once, len(index) // worth)
    yield from map_parts(_Judge(index, config, caption), parts, n_processes)


class _Judge:
    """Looks at samples by their numbers."""

    def __init__(self, index: SampleIndex, config: FilterConfig, caption: CaptionSource, first: int = 0) -> None:
        self._index = index
        self._config = config
        self._caption = caption
        self._first = first  # number of the first sample of `index`

    def part(self, numbers: range) -> _Judge:
        return _Judge(self._index.part(numbers), self._config, self._caption, first=numbers.start)

    def __call__(self, numbers: Iterable[int]) -> _Part:
        reason_of = reason_to_drop(self._config)
        reasons, hashes, could_read = {}, {}, True
        for number in numbers:
            raw = self._index[number - self._first]
            try:
                reason = reason_of(read_facts(raw, self._caption, self._config))
                if reason is not None:
                    reasons[number] = reason
                elif self._config.needs_pixels:
                    hashes[number] = hash_file(raw.image())
            except ValueError as error:  # bad samples are no matter of filters
                could_read &= getattr(error, "kind", None) != CANNOT_BE_READ
        return reasons, hashes, could_read


def _cache_path(index: SampleIndex, config: FilterConfig, caption: CaptionSource) -> Path | None:
    """Where the verdicts on these samples are remembered; None for what may change unseen: folders and tables."""
    if not isinstance(index, ShardIndex):
        return None
    if not all(map(is_settled, index.states)):
        return None
    # As they were when their headers were read: what is remembered is of these.
    states = list(zip(map(os.path.realpath, index.shards), index.states, strict=True))
    content = json.dumps([RULES_VERSION, states, len(index), config.to_dict(), caption.setting])
    return cache_directory() / "filters" / f"{hashlib.sha256(content.encode()).hexdigest()}.npz"


def _remember(path: Path, verdicts: _Verdicts) -> None:
    names, codes = verdicts
    try:
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, names=np.frombuffer(json.dumps(names).encode(), dtype=np.uint8), codes=codes)
    except OSError as error:  # a read-only or full disk costs time at the next start, and nothing else
        logger.debug("what filters found is not remembered: %s", error)


def _recall(path: Path, n_samples: int) -> _Verdicts | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            names, codes = json.loads(stored["names"].tobytes()), stored["codes"]
    except Exception:  # none, or a damaged one: it is made again
        return None
    is_whole = codes.dtype == np.uint8 and codes.shape == (n_samples,) and codes.max(initial=0) <= len(names)
    return (names, codes) if is_whole else None
