"""What the headers of a tar shard say of its samples."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

PICTURE, CAPTION, METADATA = range(3)
_PART_OF_EXTENSION = {
    "jpg": PICTURE,
    "jpeg": PICTURE,
    "png": PICTURE,
    "webp": PICTURE,
    "txt": CAPTION,
    "json": METADATA,
}
ABSENT = (-1, 0)  # offset and size of a part that a sample does not have


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardContent:
    """The samples of one shard in the order of their first members."""

    keys: list[str]
    byte_ranges: np.ndarray  # int64 (samples, 3 parts, offset and size)


def scan_shard(shard: str) -> ShardContent:
    """Read all headers of a shard, and no content.

    Raises: ValueError if it is no complete, uncompressed tar, or a key has two pictures, captions or JSON files;
        OSError if it cannot be read.
    """
    samples: dict[str, list[tuple[int, int]]] = {}
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg():
                    _add_member(samples, member, shard)
            # At a broken header tarfile just stops; only an empty block is the true end.
            file.seek(tar.offset)
            is_complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise ValueError(f"shard {shard!r} is not a readable, uncompressed tar file ({error}); replace it") from error
    if not is_complete:
        raise ValueError(f"shard {shard!r} is truncated: the tar end mark is missing; replace it")
    byte_ranges = np.array(list(samples.values()), dtype=np.int64).reshape(len(samples), 3, 2)
    return ShardContent(keys=list(samples), byte_ranges=byte_ranges)


def _add_member(samples: dict[str, list[tuple[int, int]]], member: tarfile.TarInfo, shard: str) -> None:
    path = PurePosixPath(member.name)
    stem, _, extension = path.name.partition(".")
    part = _PART_OF_EXTENSION.get(extension.lower())
    # A name that starts with a dot has no key; macOS puts such files beside the real ones.
    if part is None or not stem:
        return
    key = str(path.with_name(stem))
    parts = samples.setdefault(key, [ABSENT] * 3)
    if parts[part] != ABSENT:
        what = ("picture", "caption (.txt)", "metadata file (.json)")[part]
        raise ValueError(f"sample {key!r} in {shard!r} has more than one {what}; keys must be unique in a shard")
    parts[part] = (member.offset_data, member.size)
