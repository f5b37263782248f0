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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from platformdirs import user_cache_path
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.data.shard_scan import ShardContent, scan_shard

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_SETTLED_NS = 2_000_000_000  # file systems have times as coarse as two seconds
_MOST_THREADS = 16  # they mostly wait for the disk or the network


def read_shards(shards: Sequence[str]) -> list[ShardContent]:
    """What each shard holds: as remembered if it has not changed, else from its headers, several shards at once.

    Raises: as `scan_shard`, for the first shard in the list that has something wrong.
    """
    contents = {shard: _recall(shard) for shard in shards}
    unknown = [shard for shard, content in contents.items() if content is None]
    if unknown:
        # `map` cancels what is not begun after Ctrl-C or a bad shard.
        with ThreadPoolExecutor(min(len(unknown), _MOST_THREADS)) as pool:
            scanned = pool.map(_scan_and_remember, unknown)
            bar = tqdm(scanned, desc="reading shard headers", total=len(unknown), unit=" shards", disable=None)
            contents |= dict(zip(unknown, bar, strict=True))
    return [content for content in contents.values() if content is not None]


def _scan_and_remember(shard: str) -> ShardContent:
    # Before it is read: what changes meanwhile is another state.
    state = _state(shard)
    content = scan_shard(shard)
    if time.time_ns() - state[1] > _SETTLED_NS:
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
            if tuple(stored["state"].tolist()) != _state(shard):
                return None
            keys, byte_ranges = json.loads(stored["keys"].tobytes()), stored["byte_ranges"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or a damaged one: it is made again
        return None
    is_whole = byte_ranges.dtype == np.int64 and byte_ranges.shape == (len(keys), 3, 2)
    return ShardContent(keys=keys, byte_ranges=byte_ranges) if is_whole else None


def _state(shard: str) -> tuple[int, int, int]:
    """What changes if the shard does, or what is remembered of it."""
    facts = os.stat(shard)
    return facts.st_size, facts.st_mtime_ns, _FORMAT_VERSION


def _cache_path(shard: str) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(shard))).hexdigest()
    directory = os.environ.get("DALLE1_CACHE_DIR")
    return (Path(directory) if directory else user_cache_path("dalle1")) / "shards" / f"{name}.npz"
