"""Remembers what the headers of shards said: thousands of shards have millions of them, and every start needs all.

One file for each shard, in the user's cache directory (DALLE1_CACHE_DIR names another), never beside the data. It
counts as long as the shard has the size and the time of change that it had. Of a shard that was changed within the last
seconds nothing is remembered: the next change could leave both as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.data.raw_sample import N_PARTS
from dalle1.data.shard_scan import ShardContent, scan_shard

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 2
_SETTLED_NS = 2_000_000_000  # file systems have times as coarse as two seconds
_MOST_THREADS = 16  # they mostly wait for the disk or the network


def read_shards(shards: Sequence[str]) -> Iterator[ShardContent]:
    """What each shard holds: as remembered if it has not changed, else from its headers, several shards at once."""
    # `map` cancels what is not begun when this generator is left, as after Ctrl-C.
    with ThreadPoolExecutor(min(max(1, len(shards)), _MOST_THREADS)) as pool:
        contents = pool.map(_read_shard, shards)
        # Remembered shards take no time worth a bar.
        bar = tqdm(contents, "reading shard headers", len(shards), unit=" shards", delay=1.0, disable=None)
        yield from bar


def _read_shard(shard: str) -> ShardContent:
    return _recall(shard) or _scan_and_remember(shard)


def _scan_and_remember(shard: str) -> ShardContent:
    # Before it is read: what changes meanwhile is another state.
    state = shard_state(shard)
    content = scan_shard(shard)
    # A damaged shard is going to be replaced.
    if state is not None and is_settled(state) and not content.damages:
        try:
            with atomic(_cache_path(shard)) as temporary, open(temporary, "wb") as file:
                keys = np.frombuffer(json.dumps(content.keys).encode(), dtype=np.uint8)
                np.savez(file, state=np.array(state), keys=keys, byte_ranges=content.byte_ranges)
        except OSError as error:  # a read-only or full disk costs time at the next start, and nothing else
            logger.debug("what shard %r holds is not remembered: %s", shard, error)
    return content


def _recall(shard: str) -> ShardContent | None:
    try:
        # Opened here, because NumPy leaves a damaged file open.
        with open(_cache_path(shard), "rb") as file, np.load(file, allow_pickle=False) as stored:
            state = tuple(stored["state"].tolist())
            if state != shard_state(shard):
                return None
            keys, byte_ranges = json.loads(stored["keys"].tobytes()), stored["byte_ranges"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or a damaged one: it is made again
        return None
    is_whole = byte_ranges.dtype == np.int64 and byte_ranges.shape == (len(keys), N_PARTS, 2)
    if not is_whole:
        return None
    return ShardContent(keys=keys, byte_ranges=byte_ranges, state=(int(state[0]), int(state[1])))


def shard_state(shard: str) -> tuple[int, int, int] | None:
    """What changes if the shard does, or what is remembered of it; None if there is no such shard."""
    try:
        facts = os.stat(shard)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns, _FORMAT_VERSION


def is_settled(state: Sequence[int]) -> bool:
    """Whether the next change of a shard in this state will show."""
    return time.time_ns() - state[1] > _SETTLED_NS


def _cache_path(shard: str) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(shard))).hexdigest()
    return cache_directory() / "shards" / f"{name}.npz"


def cache_directory() -> Path:
    """Where what was found out about shards is remembered."""
    directory = os.environ.get("DALLE1_CACHE_DIR")
    return Path(directory) if directory else user_cache_path("dalle1")
