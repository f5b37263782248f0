"""Checkpoints that several processes write together: a directory, which any number of processes can read.

It holds what a checkpoint's file holds. Tensors of which each process has a part are safetensors files that carry,
beside their numbers, where these stand in the whole (written and read by `torch.distributed.checkpoint`); everything
else is in `plain.pt`. `manifest.json` names all files with their sizes and checksums. Nothing in it can execute.

`training.sharded_checkpoints` writes them.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST_NAME = "manifest.json"
PLAIN_NAME = "plain.pt"
PLACES = "places_of_tensors"  # entry of the plain part: where in the content each tensor stands
_CHUNK_BYTES = 1 << 24
_THREADS = 4  # that read files to check them

Place = tuple[str | int, ...]


def is_sharded(path: str | Path) -> bool:
    """Whether `path` is such a directory, or a link to one."""
    return (Path(path) / MANIFEST_NAME).is_file()


def describe_file(file: Path) -> dict[str, int]:
    """Size and CRC-32, which finds every changed byte of a damaged file and is more than twice as fast as SHA-256."""
    total, size = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            total = zlib.crc32(chunk, total)
            size += len(chunk)
    return {"bytes": size, "crc32": total}


def find_damage(path: str | Path, *, sums: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint in parts, in words; None if nothing is.

    Args:
        path: The directory.
        sums: Read all files and compare their checksums; else sizes alone.
    """
    path = Path(path)
    try:
        files = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        expected = {name: {"bytes": int(each["bytes"]), "crc32": int(each["crc32"])} for name, each in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} is missing or cannot be read"
    for name, each in expected.items():
        if Path(name).name != name or not (path / name).is_file():
            return f"'{name}' is missing"
        if (path / name).stat().st_size != each["bytes"]:
            return f"'{name}' must have {each['bytes']:,} bytes, it has {(path / name).stat().st_size:,}"
    if sums:
        with ThreadPoolExecutor(_THREADS) as pool:
            for name, found in zip(expected, pool.map(lambda name: describe_file(path / name), expected), strict=True):
                if found != expected[name]:
                    return f"'{name}' has another checksum"
    return None


def read_plain(path: str | Path) -> dict[str, Any]:
    """All that is not sharded. Raises: any error if it is damaged."""
    content: dict[str, Any] = torch.load(Path(path) / PLAIN_NAME, map_location="cpu", weights_only=True)
    return content


def read_sharded(
    path: str | Path,
    *,
    wanted: Callable[[Place, Collection[Place]], bool] | None = None,
    make_empty: Callable[[Sequence[int], torch.dtype], Tensor] | None = None,
) -> dict[str, Any]:
    """The content of a checkpoint in parts.

    Args:
        path: The directory.
        wanted: Says of a tensor's place in the content, and the places of all, whether it is to be read; others are
            left out. All are read if not given.
        make_empty: What tensors are read into, from shape and type: DTensors, of which each process reads its part; all
            processes of the default group must then call this together. Without, tensors are whole, on the CPU, and no
            other process takes part.

    Raises: ValueError if files are missing or cut; any error if they are otherwise damaged.
    """
    import torch.distributed.checkpoint as dcp  # takes a second, which not every command should

    if damage := find_damage(path, sums=False):
        raise ValueError(damage)
    content = read_plain(path)
    places: dict[str, Place] = content.pop(PLACES)
    reader = dcp.hf_storage.HuggingFaceStorageReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    all_places = set(places.values())
    chosen = {key for key, place in places.items() if wanted is None or wanted(place, all_places)}
    new = make_empty or (lambda size, dtype: torch.empty(tuple(size), dtype=dtype))
    tensors: dict[str, Any] = {}
    for key in chosen:
        described = stored[key]
        assert isinstance(described, dcp.metadata.TensorStorageMetadata), "safetensors hold tensors"
        tensors[key] = new(described.size, described.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*load in a single process.*")
        dcp.state_dict_loader.load(tensors, storage_reader=reader, no_dist=make_empty is None)
    for key, place in places.items():
        holder: Any = content
        for step in place[:-1]:
            holder = holder[step]
        if key in chosen:
            holder[place[-1]] = tensors[key]
        else:
            del holder[place[-1]]
    return content
