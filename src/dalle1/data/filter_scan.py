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
from dalle1.data.processes import map_parts
from dalle1.data.raw_sample import BadSampleError
from dalle1.data.sample_index import SampleIndex, Selection
from dalle1.data.shard_cache import cache_directory, is_settled, shard_state
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
            verdicts = _judge(index, config, caption)
            if path is not None:
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


def _judge(index: SampleIndex, config: FilterConfig, caption: CaptionSource) -> _Verdicts:
    codes = np.zeros(len(index), dtype=np.uint8)
    names: list[str] = []
    hashes = np.zeros(len(index), dtype=np.uint64)
    has_hash = np.zeros(len(index), dtype=bool)
    parts = [range(start, min(start + _PART, len(index))) for start in range(0, len(index), _PART)]
    with tqdm(total=len(index), desc="filtering", unit=" samples", unit_scale=True, delay=1.0, disable=None) as bar:
        for numbers, (reasons, found) in zip(parts, _judged(index, config, caption, parts), strict=True):
            for number, reason in reasons.items():
                if reason not in names:
                    names.append(reason)
                codes[number] = 1 + names.index(reason)
            hashes[list(found)] = list(found.values())
            has_hash[list(found)] = True
            bar.update(len(numbers))
    if config.needs_pixels and config.near_duplicates is not None:
        numbers_with_hash = np.flatnonzero(has_hash)
        later = near_duplicates(hashes[numbers_with_hash], config.near_duplicates)
        names.append(_NEAR_DUPLICATE)
        codes[numbers_with_hash[later]] = len(names)
    return names, codes


_Part = tuple[dict[int, str], dict[int, int]]  # by numbers: reasons to drop, and hashes of those that stay


def _judged(index: SampleIndex, config: FilterConfig, caption: CaptionSource, parts: list[range]) -> Iterator[_Part]:
    """What there is to say of each part, in order."""
    worth = _PICTURES_WORTH_A_PROCESS if config.needs_pixels else _SAMPLES_WORTH_A_PROCESS
    # Processes that torchrun has started here may do the same at the same time.
    n_cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    n_processes = min(n_cores, len(index) // worth)
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
        reasons, hashes = {}, {}
        for number in numbers:
            raw = self._index[number - self._first]
            reason = reason_of(read_facts(raw, self._caption, self._config))
            if reason is not None:
                reasons[number] = reason
            elif self._config.needs_pixels:
                try:
                    hashes[number] = hash_file(raw.image())
                except (BadSampleError, ValueError):  # bad samples are no matter of filters
                    continue
        return reasons, hashes


def _cache_path(index: SampleIndex, config: FilterConfig, caption: CaptionSource) -> Path | None:
    """Where the verdicts on these samples are remembered; None for what may change unseen: folders and tables."""
    if not isinstance(index, ShardIndex):
        return None
    states = [(os.path.realpath(shard), shard_state(shard)) for shard in index.shards]
    if not all(state is None or is_settled(state) for _, state in states):
        return None
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
