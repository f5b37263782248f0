"""Picture files by what a person names them, and their captions: paths, folders, globs, shards."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from dalle1.data.folders import pictures_below
from dalle1.data.raw_sample import CAPTION, RawSample
from dalle1.data.shards import ShardIndex

_LONGEST_NAME = 150  # bytes; file systems allow 255, and files have longer names while they are written


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """An undecoded picture that has not been read yet."""

    source: str  # its path; in a shard, the shard's path and the sample's key
    stem: str  # name without folder and extension
    read: Callable[[], bytes]  # raises OSError or, for a sample without a picture, ValueError
    # Of its sample, or the .txt of its name beside it; None without one. Raises OSError, or ValueError if it is not
    # UTF-8.
    read_caption: Callable[[], str | None] = lambda: None


def find_pictures(patterns: Sequence[str]) -> list[PictureFile]:
    """The pictures that paths name, each once, in the order of the paths.

    A path is a file of any name, a folder (its .jpg, .jpeg, .png and .webp files at any depth, sorted; hidden ones
    are passed over), an uncompressed .tar shard in the layout of `data.shards`, or a glob of these.

    Raises: FileNotFoundError for a path or glob that leads nowhere and for a folder without pictures; ValueError for
        what is neither file nor folder, and for a damaged shard; OSError for a folder that cannot be read.
    """
    paths: dict[str, str] = {}
    for pattern in patterns:
        for path in _expand(pattern):
            paths.setdefault(os.path.abspath(path), path)
    return [file for path in paths.values() for file in _open(path)]


def unique_names(files: Sequence[PictureFile]) -> Iterator[str]:
    """A name for what is made of each picture: its own; the second of that name gets `-2` and so on, in any case."""
    taken = set()
    for file in files:
        stem = os.fsencode(file.stem)[:_LONGEST_NAME].decode(errors="ignore")
        name, number = stem, 2
        while name.casefold() in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name.casefold())
        yield name


def printable(path: str) -> str:
    """A path as text: file names may be any bytes, tables and JSON take text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _expand(pattern: str) -> Iterator[str]:
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise FileNotFoundError(f"no picture, folder or shard at {pattern!r}; correct the path")
    for path in matches:
        if os.path.isdir(path):
            yield from pictures_below(path)
        elif os.path.isfile(path):
            yield path
        else:
            raise ValueError(f"pictures must be files, folders or shards, got {path!r}, which is none of them")


def _open(path: str) -> Iterator[PictureFile]:
    if not path.lower().endswith(".tar"):
        file = Path(path)
        yield PictureFile(
            source=path, stem=file.stem, read=file.read_bytes, read_caption=partial(_caption_beside, file)
        )
        return
    shard = ShardIndex(path)
    for i in range(len(shard)):
        sample = shard[i]
        yield PictureFile(
            source=f"{path}/{sample.key}",
            stem=PurePosixPath(sample.key).name,
            read=sample.image,
            read_caption=partial(_caption_of, sample),
        )


def _caption_of(sample: RawSample) -> str | None:
    return None if sample.part(CAPTION) is None else sample.text()


def _caption_beside(picture: Path) -> str | None:
    path = picture.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption must be UTF-8 text, '{printable(str(path))}' is not ({error.reason})") from error
