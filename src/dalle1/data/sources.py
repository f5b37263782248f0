"""Where pictures come from: what `data.train` and `data.val` may say, and the samples behind it."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dalle1.data.folders import TABLE_EXTENSIONS, FolderIndex, TableIndex
from dalle1.data.sample_index import JoinedIndex, SampleIndex
from dalle1.data.shards import ShardIndex, check_distinct, expand_braces

Split = Literal["train", "val"]
# As it stands in the configuration: one path, or several, each by itself or with a weight.
SourceSetting = str | dict[str, Any] | list[str | dict[str, Any]]
_FIELDS = ("path", "weight")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some places that pictures come from, and how often each of their samples comes in an epoch."""

    paths: tuple[str, ...]
    weight: float = 1.0

    @property
    def is_remote(self) -> bool:
        """Whether any of the places is an address or a command rather than a path."""
        return any(is_remote(path) for path in self.paths)


def is_remote(path: str) -> bool:
    """Whether it is an address, such as https://, s3://, gs:// or hf://, or a command after pipe:."""
    return "://" in path or path.startswith("pipe:")


def without_secrets(address: str) -> str:
    """An address for messages and names: without user and password and, of a web server, the query."""
    if "://" not in address or address.startswith("pipe:"):
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    path = re.split(r"[?#]", path)[0] if scheme in ("http", "https") else path
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def parse_sources(setting: SourceSetting, name: str = "data.train") -> list[Source]:
    """The places that a setting names; paths without a weight are together the first of them.

    A setting is a path, a mapping `{path: PATH or [PATHS], weight: NUMBER}`, or a list of these.

    Raises: TypeError if it is something else; ValueError for weights that are not finite numbers above 0, or nothing.
    """
    items = setting if isinstance(setting, list) else [setting]
    plain: list[str] = []
    weighted: list[Source] = []
    for item in items:
        if isinstance(item, str):
            plain.append(item)
        elif isinstance(item, dict):
            weighted.append(_parse_weighted(item, name))
        else:
            raise TypeError(f"{name} must be a path, a glob or a list of them, got {setting!r}")
    sources = [Source(paths=tuple(plain))] if plain else []
    if not (sources + weighted):
        raise ValueError(f"{name} must name at least one tar file, folder or table, got an empty list")
    return sources + weighted


def _parse_weighted(item: dict[str, Any], name: str) -> Source:
    paths, weight = item.get("path"), item.get("weight", 1.0)
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise TypeError(f"{name}: a mapping must have a path or a list of paths under 'path', got {item!r}")
    if unknown := [key for key in item if key not in _FIELDS]:
        raise ValueError(f"{name}: a mapping has the fields {' and '.join(_FIELDS)}, got {unknown[0]!r} in {item!r}")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"{name}: weight must be a number > 0, got {weight!r}")
    if not 0 < weight < math.inf:
        raise ValueError(f"{name}: weight must be a finite number > 0, got {weight!r}")
    return Source(paths=tuple(paths), weight=float(weight))


def open_index(paths: Sequence[str], *, skip_damage: bool = False) -> SampleIndex:
    """The samples of local places in the order of `paths`: tar shards, folders of pictures and tables.

    Each path is a file or folder, a glob, or either with braces (see `shards.expand_shards`).

    Args:
        paths: Which places, at least one.
        skip_damage: See `ShardIndex`.

    Raises: ValueError, TypeError or OSError as `ShardIndex`, `FolderIndex` and `TableIndex` do.
    """
    groups: list[tuple[bool, list[str]]] = []  # consecutive shards are one index
    for path in paths:
        # `folder/` and `folder` are the same.
        for name in [path] if is_remote(path) else expand_braces(path):
            for place in _expand_other(name) or [name]:
                is_shard = not (os.path.isdir(place) or place.lower().endswith(TABLE_EXTENSIONS))
                if is_shard and groups and groups[-1][0]:
                    groups[-1][1].append(place)
                else:
                    groups.append((is_shard, [place]))
    check_distinct([place for _, places in groups for place in places if os.path.exists(place)])
    parts: list[SampleIndex] = []
    for is_shard, places in groups:
        if is_shard:
            parts.append(ShardIndex(places, skip_damage=skip_damage, may_be_empty=len(groups) > 1))
        elif os.path.isdir(places[0]):
            parts.append(_open_folder(places[0]))
        else:
            parts.append(TableIndex(places[0]))
    index = parts[0] if len(parts) == 1 else JoinedIndex(parts)
    if not len(index):
        raise ValueError(f"shards must hold samples, there are none; the first damage: {index.damages[0].message}")
    return index


def _expand_other(pattern: str) -> list[str]:
    """The folders and tables that a glob names; nothing for shards, which `expand_shards` knows."""
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    others = [path for path in matches if os.path.isdir(path) or path.lower().endswith(TABLE_EXTENSIONS)]
    return matches if others else []


def _open_folder(folder: str) -> FolderIndex:
    try:
        return FolderIndex(folder)
    except FileNotFoundError as error:
        if glob.glob(f"{glob.escape(folder)}/*.tar"):
            name = folder.rstrip("/")
            raise ValueError(f"shards must be tar files, got directory {folder!r}; write '{name}/*.tar'") from error
        raise
