"""What the headers of a tar shard say of its samples, and what is wrong with it."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, Self, get_args

import numpy as np

from dalle1.data.raw_sample import N_PARTS, PART_NAMES, PART_OF_EXTENSION, PICTURE_EXTENSIONS

ABSENT = (-1, 0)  # offset and size of a part that a sample does not have

_Member = tuple[str, int, int]  # name, offset and size in bytes
_END = bytes(tarfile.BLOCKSIZE)
_HEADERS_WITH_CONTENT = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_SAYS_OF_THE_NEXT = (b"x", b"L")  # headers of the member that follows
_REGULAR = (b"0", b"\0")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories, pipes
# Longer numbers are no sizes, and longer headers no names.
_MOST_DIGITS, _LONGEST_HEADER = 18, 1 << 20
_UNUSUAL_RECORDS = (b"hdrcharset", b"GNU.sparse.map", b"GNU.sparse.size", b"GNU.sparse.major")


DamageKind = Literal[
    "shard cannot be read", "shard is no tar", "shard is truncated", "name leads out of the shard", "key used twice"
]
DAMAGE_KINDS: tuple[str, ...] = get_args(DamageKind)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something wrong with a shard itself; what else is in it can be used."""

    kind: DamageKind
    message: str  # one sentence that names the shard


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardContent:
    """The samples of one shard in the order of their first members."""

    keys: list[str]
    byte_ranges: np.ndarray  # int64 (samples, parts, offset and size)
    state: tuple[int, int] = (-1, -1)  # size and time of change, in ns, of the file that was read
    damages: list[Damage] = field(default_factory=list)


def scan_shard(shard: str) -> ShardContent:
    """Read all headers of a shard, and no content.

    Whatever is wrong with the shard is one of its damages, and the samples are those that are whole all the same: up
    to where a shard is cut short, the first of two pictures with one key, none of what is no tar.
    """
    members: list[_Member] = []
    damages: list[Damage] = []
    state = (-1, -1)
    try:
        if not os.path.isfile(shard) and os.path.exists(shard):  # opening a pipe would wait for its other end
            raise OSError("it is not a file")
        with open(shard, "rb") as file:
            facts = os.fstat(file.fileno())
            state = (facts.st_size, facts.st_mtime_ns)
            try:
                members = _usual_members(file)
            except _UnusualError:
                members, damages = _any_members(file, shard)
    except OSError as error:
        sentence = f"shard {shard!r} cannot be read ({error.strerror or error}); restore it or leave it out"
        damages.append(Damage(kind="shard cannot be read", message=sentence))
    samples: dict[str, list[tuple[int, int]]] = {}
    for name, offset, size in members:
        damage = _add_member(samples, name, offset, size, shard)
        damages += [damage] if damage else []
    byte_ranges = np.array(list(samples.values()), dtype=np.int64).reshape(len(samples), N_PARTS, 2)
    return ShardContent(keys=list(samples), byte_ranges=byte_ranges, state=state, damages=damages)


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
            if length > _LONGEST_HEADER:
                raise _UnusualError
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
        if not space or not length.isdigit() or len(length) > _MOST_DIGITS:
            raise _UnusualError
        if not len(length) < int(length) <= len(content):
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
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS:
        raise _UnusualError
    return int(text)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")  # as tarfile does


class BoundedMember(tarfile.TarInfo):
    """A member whose headers may not fill the memory; its tar's `has_end_mark` says how that ended.

    At a broken or missing header `tarfile` just stops, as at the end mark.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """The next member of `tar`. Raises: tarfile.HeaderError at its end, whatever that is."""
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.has_end_mark = isinstance(error, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
            raise

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _HEADERS_WITH_CONTENT and self.size > _LONGEST_HEADER:
            raise tarfile.InvalidHeaderError("header too long")  # type: ignore[attr-defined]
        return super()._proc_member(tar)  # type: ignore[misc]


def _any_members(file: BinaryIO, shard: str) -> tuple[list[_Member], list[Damage]]:
    """Regular files of any tar that are whole, and what is wrong with it."""
    size = os.fstat(file.fileno()).st_size
    members: list[_Member] = []
    try:
        # An encoding of names is tried, and it is not this tar's fault if the machine's default is another.
        with tarfile.open(
            fileobj=file, mode="r:", tarinfo=BoundedMember, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    members.append((member.name, member.offset_data, member.size))
            # At a broken header tarfile just stops; only an empty block is the true end.
            file.seek(tar.offset)
            is_complete = file.read(tarfile.BLOCKSIZE) == _END
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        if not members:
            what_to_do = (
                "that is a picture: give the folder it is in"
                if shard.lower().endswith(PICTURE_EXTENSIONS)
                else "replace it"
            )
            sentence = f"shard {shard!r} is not a readable, uncompressed tar file ({error}); {what_to_do}"
            return [], [Damage(kind="shard is no tar", message=sentence)]
        is_complete = False
    if is_complete:
        return members, []
    sentence = f"shard {shard!r} is truncated: the tar end mark is missing; replace it"
    whole = [(name, offset, length) for name, offset, length in members if offset + length <= size]
    return whole, [Damage(kind="shard is truncated", message=sentence)]


def split_name(member: str) -> tuple[str, str] | tuple[None, None]:
    """Key and extension of a member, in lower case; nothing if it is no part of a sample."""
    stem, _, extension = member.rpartition("/")[2].partition(".")
    # A name that starts with a dot has no key; macOS puts such files beside the real ones.
    if extension.lower() not in PART_OF_EXTENSION or not stem:
        return None, None
    return str(PurePosixPath(member).with_name(stem)) if "/" in member else stem, extension.lower()


def leads_out(member: str) -> bool:
    """Whether a member's name leads out of where it would be unpacked.

    Nothing is unpacked here, but what is written from such a key could be.
    """
    return member.startswith("/") or ".." in member.split("/")


def name_damage(member: str, shard: str) -> Damage:
    """What is wrong with a shard that holds `member`, whose name leads out of it."""
    sentence = f"shard {shard!r} has a file whose name leads out of it, {member!r}; replace it"
    return Damage(kind="name leads out of the shard", message=sentence)


def _add_member(
    samples: dict[str, list[tuple[int, int]]], member: str, offset: int, size: int, shard: str
) -> Damage | None:
    """Note a member as part of its sample, or say why not."""
    key, extension = split_name(member)
    if key is None or extension is None:
        return None
    if leads_out(member):
        return name_damage(member, shard)
    part = PART_OF_EXTENSION[extension]
    parts = samples.setdefault(key, [ABSENT] * N_PARTS)
    if parts[part] != ABSENT:
        sentence = f"sample {key!r} in {shard!r} has more than one {PART_NAMES[part]}; keys must be unique in a shard"
        return Damage(kind="key used twice", message=sentence)
    parts[part] = (offset, size)
    return None
