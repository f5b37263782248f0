"""What the headers of a tar shard say of its samples."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

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

_Member = tuple[str, int, int]  # name, offset and size in bytes
_END = bytes(tarfile.BLOCKSIZE)
_SAYS_OF_THE_NEXT = (b"x", b"L")  # headers of the member that follows
_REGULAR = (b"0", b"\0")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes
_UNUSUAL_RECORDS = (b"hdrcharset", b"GNU.sparse.map", b"GNU.sparse.size", b"GNU.sparse.major")


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
    with open(shard, "rb") as file:
        try:
            members = _usual_members(file)
        except _UnusualError:
            members = _any_members(file, shard)
    for name, offset, size in members:
        _add_member(samples, name, offset, size, shard)
    byte_ranges = np.array(list(samples.values()), dtype=np.int64).reshape(len(samples), 3, 2)
    return ShardContent(keys=list(samples), byte_ranges=byte_ranges)


class _UnusualError(Exception):
    """A header that programs which write shards do not write, or a damaged one."""


def _usual_members(file: BinaryIO) -> list[_Member]:
    """Regular files of a tar whose headers are POSIX's, its extended ones (pax) or GNU's long names.

    `tarfile` knows everything and takes five times as long (24,000 samples in 12 shards, one thread). What headers say
    of owners and times is not looked at.

    Raises: _UnusualError for all else, so that `tarfile` may look at it.
    """
    descriptor, position = file.fileno(), 0
    members: list[_Member] = []
    name: str | None = None  # of the next member, where a header of its own says it
    size: int | None = None
    while (header := os.pread(descriptor, tarfile.BLOCKSIZE, position)) != _END:
        kind, length = _parse_header(header)
        position += tarfile.BLOCKSIZE
        if kind in _SAYS_OF_THE_NEXT:
            content = os.pread(descriptor, _in_blocks(length), position)
            if kind == b"L":
                name = _decode(content.partition(b"\0")[0])
            else:
                records = _parse_records(content)
                name, size = records.get("path", name), _parse_number(records.get("size"), size)
        else:
            length = length if size is None else size
            if kind in _REGULAR:
                members.append((_name_in(header) if name is None else name, position, length))
            elif kind in _WITHOUT_CONTENT:
                length = 0
            else:
                raise _UnusualError
            name = size = None
        position += _in_blocks(length)
    return members


def _in_blocks(length: int) -> int:
    return -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _parse_header(header: bytes) -> tuple[bytes, int]:
    """Type and size of a member."""
    kind = header[156:157]
    try:
        checksum, length = (
            int(field.partition(b"\0")[0].decode("ascii").strip() or "0", 8)
            for field in (header[148:156], header[124:136])
        )
    except ValueError:  # large numbers are written in another way
        raise _UnusualError from None
    # The sum of all bytes, those of the checksum itself taken as spaces.
    if len(header) < tarfile.BLOCKSIZE or length < 0 or sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
        raise _UnusualError
    return kind, length


def _name_in(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    if name.endswith(b"/"):  # once a way to write directories
        raise _UnusualError
    return _decode(name)


def _parse_records(content: bytes) -> dict[str, str]:
    """Records of an extended header: length, space, key, equals sign, value, line feed."""
    records: dict[str, str] = {}
    while content and content[0]:
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(content):
            raise _UnusualError
        key, equals, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals or content[int(length) - 1 : int(length)] != b"\n" or key in _UNUSUAL_RECORDS:
            raise _UnusualError
        records[_decode(key)] = _decode(value)
        content = content[int(length) :]
    return records


def _parse_number(text: str | None, otherwise: int | None) -> int | None:
    if text is None:
        return otherwise
    if not text.isascii() or not text.isdigit():
        raise _UnusualError
    return int(text)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")  # as tarfile does


def _any_members(file: BinaryIO, shard: str) -> list[_Member]:
    """Regular files of any tar. Raises: ValueError as `scan_shard`."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
            # At a broken header tarfile just stops; only an empty block is the true end.
            file.seek(tar.offset)
            is_complete = file.read(tarfile.BLOCKSIZE) == _END
    except tarfile.TarError as error:
        raise ValueError(f"shard {shard!r} is not a readable, uncompressed tar file ({error}); replace it") from error
    if not is_complete:
        raise ValueError(f"shard {shard!r} is truncated: the tar end mark is missing; replace it")
    return members


def _add_member(samples: dict[str, list[tuple[int, int]]], member: str, offset: int, size: int, shard: str) -> None:
    stem, _, extension = member.rpartition("/")[2].partition(".")
    part = _PART_OF_EXTENSION.get(extension.lower())
    # A name that starts with a dot has no key; macOS puts such files beside the real ones.
    if part is None or not stem:
        return
    key = str(PurePosixPath(member).with_name(stem)) if "/" in member else stem
    parts = samples.setdefault(key, [ABSENT] * 3)
    if parts[part] != ABSENT:
        what = ("picture", "caption (.txt)", "metadata file (.json)")[part]
        raise ValueError(f"sample {key!r} in {shard!r} has more than one {what}; keys must be unique in a shard")
    parts[part] = (offset, size)
