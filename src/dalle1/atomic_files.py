"""Files and directories that are either whole or absent, whenever the process dies."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; at the end of the block it is synced and gets the name `path`.

    The directory is made if it is missing. If the block raises, nothing stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its own name, because several processes may write the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_partial(directory: str | Path) -> None:
    """Remove what killed processes have left unfinished anywhere below a directory; none may be writing there now."""
    for path in list(Path(directory).rglob(".*.partial")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_directory(directory: str | Path) -> Path:
    """`directory` as a path, if a new one may be written there.

    Raises: FileExistsError if it exists, unless it is an empty directory.
    """
    path = Path(directory)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"out must not exist yet or be an empty directory, got '{path}'; choose another one")
    return path


@contextmanager
def atomic_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory beside `directory` to fill; at the end of the block it gets its name.

    Parents are made if they are missing. If the block raises, nothing stays. Files are synced only if they are
    written with `atomic`.

    Raises: FileExistsError as `check_directory`.
    """
    # Resolved, because "." cannot be replaced by its relative name.
    target = check_directory(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    temporary.mkdir()
    try:
        yield temporary
        check_directory(target)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON. Raises: ValueError for numbers that are not finite, which JSON lacks."""
    with atomic(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
