"""Write captioned pictures as a tar shard, in the layout that `shards` reads; the same samples give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from webdataset import TarWriter


@dataclass(frozen=True, kw_only=True)
class EncodedPicture:
    """An encoded picture and what is known about it."""

    extension: str  # of its format: jpg, png or webp
    data: bytes
    width: int
    height: int
    caption: str | None  # None for a picture without one
    metadata: dict[str, Any] = field(default_factory=dict)  # goes into the .json beside caption, key and size


def write_shard(path: Path, pictures: Iterable[EncodedPicture], *, first: int = 0) -> int:
    """Write one shard, whose keys count from `first`, and return its number of samples."""
    n_samples = 0
    # A fixed time stamp, or else no two runs would give the same file.
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, picture in enumerate(pictures, first):
            key = f"{number:09d}"
            metadata = {
                "caption": picture.caption,
                "key": key,
                "status": "success",
                "width": picture.width,
                "height": picture.height,
                **picture.metadata,
            }
            sample: dict[str, Any] = {"__key__": key, picture.extension: picture.data}
            if picture.caption is not None:
                sample["txt"] = picture.caption.encode()
            tar.write({**sample, "json": json.dumps(metadata).encode()})
            n_samples += 1
    return n_samples
