"""Shards that are read from beginning to end, from anywhere: addresses through fsspec, commands, local files."""

from __future__ import annotations

import logging
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO, cast

import fsspec
from aiohttp import ClientTimeout
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys

from dalle1.data.folders import TABLE_EXTENSIONS
from dalle1.data.raw_sample import MAX_PART_BYTES, PART_OF_EXTENSION, BadSampleError, RawSample
from dalle1.data.shard_scan import BoundedMember, Damage, leads_out, name_damage, split_name
from dalle1.data.shards import check_distinct, expand_braces, expand_shards
from dalle1.data.sources import is_remote, without_secrets

logger = logging.getLogger(__name__)

_PIPE = "pipe:"
# Networks have hiccups: after each failure it waits, twice as long as before, and goes on where it was; so often in a
# row without a new sample, and the shard is given up.
_ATTEMPTS = 3
_FIRST_PAUSE_SECONDS = 1.0
# A shard is read as slowly as training needs it, so the whole may take hours; no single read may.
_CONNECT_SECONDS, _READ_SECONDS = 30, 120
_WHAT_INSTALLS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}


def expand_addresses(paths: Sequence[str], *, allow_pipe: bool = False, missing_ok: bool = False) -> list[str]:
    """Addresses of the shards that `paths` name: each an address, a command after `pipe:`, or a local path.

    A local one must be there, unless `missing_ok`. Ranges in braces stand for their names, and `*` for what is there,
    where the place can be listed (not https://).

    Raises: ValueError for a command unless `allow_pipe`, a directory, or an address that no shard matches or nothing
        installed can read; for local paths all that `shards.expand_shards` raises.
    """
    shards: list[str] = []
    for path in paths:
        if path.startswith(_PIPE):
            if not allow_pipe:
                raise ValueError(f"a command is only run with data.allow_pipe=true, got {path!r}")
            shards.append(path)
        elif not is_remote(path):
            if os.path.isdir(path) or path.lower().endswith(TABLE_EXTENSIONS):
                raise ValueError(f"a stream must have shards, got folder or table {path!r}; use data.backend=indexed")
            shards += expand_shards([path], missing_ok=missing_ok)
        else:
            if path.endswith("/"):
                raise ValueError(f"shards must be tar files, got directory {path!r}; write '{path}*.tar'")
            for name in expand_braces(path):
                shards += _glob(name) if "*" in name else [name]
    if not shards:
        raise ValueError("shards must name at least one tar file, got an empty list")
    check_distinct(shards)
    return shards


def _glob(address: str) -> list[str]:
    try:
        file_system, path = fsspec.core.url_to_fs(address)
        found = sorted(file_system.unstrip_protocol(name) for name in file_system.glob(path))
    except ImportError as error:
        raise _not_installed(without_secrets(address), error) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the shards at {without_secrets(address)!r} cannot be listed ({_reason(error)}); name them in braces"
        ) from error
    if not found:
        raise ValueError(f"no shards match {without_secrets(address)!r}; correct the address")
    return found


def _not_installed(address: str, error: ImportError) -> ValueError:
    package = _WHAT_INSTALLS.get(address.partition("://")[0])
    hint = f"pip install {package}" if package else str(error)
    return ValueError(f"{address!r} needs a package that is not installed; {hint}")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if ended := re.search(r"exit (\d+) \(read\)", text):  # of WebDataset's pipe
        return f"its command ended with status {ended[1]}"
    if not text or re.fullmatch(r"\w+://\S+", text):  # fsspec says no more of a web server than the address
        cause = error.__cause__ or error.__context__
        return _reason(cause) if cause else type(error).__name__
    return re.sub(r"\w+://[^\s'\")]+", lambda address: without_secrets(address[0]), text)


def read_shard(shard: str, report: Callable[[Damage], None]) -> Iterator[RawSample]:
    """The samples of a shard as they come; what is wrong with it is reported, and what came before it counts.

    A shard that breaks off is tried again where it broke off, after a pause, except where it is the tar itself that is
    damaged. WebDataset groups the members; compressed tars are refused as by `ShardIndex`.

    Raises: ValueError if no installed package can read the address.
    """
    n_given = n_reported = n_failures = 0
    name = without_secrets(shard)
    while True:
        n_before, n_met = n_given, 0

        def report_new(damage: Damage) -> None:
            nonlocal n_met, n_reported
            n_met += 1
            if n_met > n_reported:
                n_reported = n_met
                report(damage)

        try:
            for number, sample in enumerate(_samples(shard, report_new)):
                if number >= n_given:
                    n_given += 1
                    yield sample
            return
        except BadSampleError:  # of `report`, to which damage is an error
            raise
        except ImportError as error:
            raise _not_installed(name, error) from error
        except tarfile.TarError as error:
            sentence = f"shard {name!r} is truncated or no tar file ({_reason(error)}); replace it"
            report(Damage(kind="shard is truncated", message=sentence))
            return
        except Exception as error:  # networks, file systems and decompressors raise all kinds
            # A server may send no longer than it wants to, as often as training is slow: it counts what comes of it.
            n_failures = 1 if n_given > n_before else n_failures + 1
            if n_failures == _ATTEMPTS or _is_gone(error):
                sentence = f"shard {name!r} cannot be read ({_reason(error)}); restore it or leave it out"
                report(Damage(kind="shard cannot be read", message=sentence))
                return
            pause = _FIRST_PAUSE_SECONDS * 2 ** (n_failures - 1)
            logger.warning("shard %r broke off (%s); trying again in %g s", name, _reason(error), pause)
            time.sleep(pause)


def _is_gone(error: Exception) -> bool:
    """Whether trying again is of no use."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        # So fsspec calls whatever a web server does instead of answering, as if it were down for good.
        return isinstance(error.__cause__, FileNotFoundError) or getattr(error.__cause__, "status", None) in (404, 410)
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


def _samples(shard: str, report: Callable[[Damage], None]) -> Iterator[RawSample]:
    name = without_secrets(shard)
    with _open(shard) as stream:
        twice: list[Exception] = []

        def pass_over(error: Exception) -> bool:
            twice.append(error)
            return True

        for sample in group_by_keys(_members(stream, name, report), keys=split_name, handler=pass_over):
            parts: dict[int, bytes] = {}
            for extension, part in PART_OF_EXTENSION.items():
                if extension in sample and part in parts:
                    twice.append(ValueError(extension))
                elif extension in sample:
                    parts[part] = sample[extension]
            if twice:
                sentence = f"sample {sample['__key__']!r} in {name!r} has two files of a kind; keys must be unique"
                report(Damage(kind="key used twice", message=sentence))
                twice.clear()
            if parts:
                yield RawSample(key=sample["__key__"], container=name, read_part=partial(_read, parts))


def _read(parts: dict[int, bytes], part: int, n_bytes: int) -> bytes | None:
    data = parts.get(part)
    return None if data is None else data[:n_bytes]


def _open(shard: str) -> BinaryIO:
    if shard.startswith(_PIPE):  # `expand_addresses` has let it through
        return cast("BinaryIO", gopen(shard))
    options: dict[str, Any] = {}
    if not is_remote(shard) and not os.path.isfile(shard) and os.path.exists(shard):
        raise IsADirectoryError("it is not a file")  # opening a pipe would wait for its other end
    if shard.startswith(("http://", "https://")):
        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        # One answer from beginning to end: parts of a file are more than many servers can give. And through the proxies
        # that the environment names.
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "block_size": 0}
    return cast("BinaryIO", fsspec.open(shard, "rb", **options).open())


def _members(stream: BinaryIO, shard: str, report: Callable[[Damage], None]) -> Iterator[dict[str, Any]]:
    """Names and contents of the files that samples have, as WebDataset's `group_by_keys` takes them."""
    with tarfile.open(
        fileobj=stream, mode="r|", tarinfo=BoundedMember, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # it remembers all, and a stream has no way back
            _, extension = split_name(member.name)
            if not member.isreg() or member.issparse() or extension is None:
                continue
            if leads_out(member.name):
                report(name_damage(member.name, shard))
                continue
            # One byte more than allowed is enough to see that it is too large.
            limit = MAX_PART_BYTES[PART_OF_EXTENSION[extension]] + 1
            file = tar.extractfile(member)
            assert file is not None, "a regular file has content"
            data = file.read(limit)
            if len(data) < min(member.size, limit):
                raise tarfile.ReadError("unexpected end of data")
            yield {"fname": member.name, "data": data, "__url__": shard}
        if not tar.has_end_mark:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the tar end mark is missing")
