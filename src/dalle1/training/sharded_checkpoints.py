"""Writing checkpoints in parts, by all processes together: the directory is whole or absent."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from dalle1.atomic_files import write_json
from dalle1.sharded_files import MANIFEST_NAME, PLACES, PLAIN_NAME, Place, describe_file


def write_sharded(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to the directory `path`; all processes of the default group must call this together.

    Every process writes its parts beside the place; the first one gives the directory its name when all files are
    written, synced and named in the manifest. What had the name before goes.

    Args:
        path: Where the directory is to be, the same for all processes.
        content: Nested dicts and lists of plain values and tensors. Of DTensors all parts are saved, of everything else
            what the first process has.

    Raises: on all processes the error of one, OSError for instance if its disk is full; then nothing stays.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, Place] = {}
    plain = _take_out(content, (), tensors, places)
    is_first = dist.get_rank() == 0
    token = [secrets.token_hex(4)]
    dist.broadcast_object_list(token, src=0)
    temporary = path.with_name(f".{path.name}.{token[0]}.partial")
    try:
        together(lambda: _begin(path, temporary) if is_first else None)
        _save_tensors(temporary, tensors, {key: _file_of(place) for key, place in places.items()})
        mine = sorted(temporary.glob(f"shard-{dist.get_rank() + 1:05d}-*"))
        sums = together(lambda: {file.name: describe_file(file) for file in mine})
        if is_first:
            together(lambda: _finish(path, temporary, {**plain, PLACES: places}, sums))
        else:
            together(lambda: None)
    except BaseException:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _take_out(value: Any, place: Place, tensors: dict[str, Tensor], places: dict[str, Place]) -> Any:
    """`value` without the DTensors in it, which go to `tensors`, and where they stood to `places`."""
    if isinstance(value, DTensor):
        key = "/".join(str(step) for step in place)
        tensors[key], places[key] = value.detach(), place
        return None
    if isinstance(value, dict):
        return {name: _take_out(each, (*place, name), tensors, places) for name, each in value.items()}
    if isinstance(value, list):
        return [_take_out(each, (*place, number), tensors, places) for number, each in enumerate(value)]
    return value


def _file_of(place: Place) -> str:
    """Tensors for which this is the same share a file: of a network's weights, of their average, of one moment.

    A file is built in memory before it is written, and who wants the weights alone need not open the moments."""
    return f"{place[0]}/{place[-1]}" if place[0] == "optimizer_states" else str(place[0])


def _begin(path: Path, temporary: Path) -> None:
    # What a process that was killed has left: no other run writes here.
    for left in path.parent.glob(".*.ckpt.*.partial"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)


def _save_tensors(directory: Path, tensors: dict[str, Tensor], files: dict[str, str]) -> None:
    numbers = {name: number for number, name in enumerate(sorted(set(files.values())), start=1)}
    writer = HuggingFaceStorageWriter(
        str(directory), fqn_to_index_mapping={key: numbers[name] for key, name in files.items()}, save_distributed=True
    )
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # no Exception
        rank, (first, _) = min(error.failures.items())
        raise first if isinstance(first, OSError) else OSError(f"device {rank} cannot save its part: {first}") from None


def _finish(path: Path, temporary: Path, plain: dict[str, Any], sums: list[dict[str, Any]]) -> None:
    with (temporary / PLAIN_NAME).open("wb") as file:
        torch.save(plain, file)
        file.flush()
        os.fsync(file.fileno())
    files = {name: each for part in sums for name, each in part.items()}
    files[PLAIN_NAME] = describe_file(temporary / PLAIN_NAME)
    write_json(temporary / MANIFEST_NAME, {"files": files})
    _sync_directory(temporary)
    if path.is_dir() and not path.is_symlink():
        # A directory is not replaced by renaming.
        old = path.with_name(f"{temporary.name.removesuffix('.partial')}.old.partial")
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old)
    else:
        path.unlink(missing_ok=True)
        temporary.rename(path)
    _sync_directory(path.parent)


def point_to(link: Path, target: Path) -> None:
    """Make `link` a name of `target`, a neighbour of it; whoever looks finds the old one or the new one.

    What it named before goes if it is its own, `best-step0000500.ckpt` of `best.ckpt`."""
    before = link.resolve() if link.is_symlink() else target
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}.partial")
    temporary.symlink_to(target.name)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(link.parent)
    if before.name != target.name and before.name.startswith(f"{link.stem}-"):
        shutil.rmtree(before, ignore_errors=True)


def together(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each process; if it raises on one, this raises that error on all."""
    try:
        mine: Any = work()
    except Exception as error:
        mine = error
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    for each in results:
        if isinstance(each, Exception):
            raise each
    return results


def _sync_directory(directory: Path) -> None:
    """Make new names in it last."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
