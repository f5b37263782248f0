"""What is in the file of an offline run of Weights & Biases."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER, _BLOCK = 7, 32_768  # bytes: of the file, and of what LevelDB's format for logs divides it into
_LAST_PARTS = (1, 4)  # of a record: the only one, and the last of several


def records(path: Path) -> Iterator[Any]:
    """All records of a `.wandb` file, as W&B's own messages."""
    content, place, parts = path.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        place += _HEADER
        parts += content[place : place + length]
        place += length
        if kind in _LAST_PARTS:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


class OfflineRun:
    """One start of a run: its id, name, group, job type, config, history and summary."""

    def __init__(self, directory: Path) -> None:
        """Read the one `.wandb` file of a directory `offline-run-...`."""
        (path,) = directory.glob("*.wandb")
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.artifact_files: dict[str, Path] = {}  # of tables: where each waits to be uploaded
        for record in records(path):
            if record.HasField("run"):
                self.id, self.name = record.run.run_id, record.run.display_name
                self.group, self.job_type = record.run.run_group, record.run.job_type
                self.config |= _items(record.run.config.update)
            elif record.HasField("config"):
                self.config |= _items(record.config.update)
            elif record.HasField("history"):
                self.history.append(_items(record.history.item))
            elif record.HasField("summary"):
                self.summary |= _items(record.summary.update)
            elif record.HasField("artifact"):
                files = record.artifact.manifest.contents
                self.artifact_files |= {each.path: Path(each.local_path) for each in files}


def _items(items: Any) -> dict[str, Any]:
    return {"/".join([item.key] if item.key else item.nested_key): json.loads(item.value_json) for item in items}
