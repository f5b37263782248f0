"""Long computations over a set of pictures in chunks, each a file: interrupted ones go on, and processes share them.

A computation has a directory `<digits>` in the cache, called after the hash of its recipe, all that decides its
numbers. `recipe.json` has that in words, `00000.safetensors` and so on the tensors of each chunk. Chunks appear whole
or not at all, so what is there is done, whichever process of whichever command computed it; removing the directory is
safe at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dalle1.atomic_files import atomic, write_json
from dalle1.evaluation.ranks import Ranks

DEFAULT_CACHE = "runs/features"
CHUNK_SIZE = 256  # pictures: seconds of work, and one file of at most a few megabytes
_FORMAT_VERSION = 1
_NAME_DIGITS = 20  # of the recipe's hash

Compute = Callable[[range], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """A computation that is done, on the disk."""

    directory: Path
    n: int  # pictures
    chunk_size: int

    def load(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Its tensors, those of all chunks joined along their first dimension; of `names` those that there are.

        Raises: as `parts`.
        """
        parts: dict[str, list[Tensor]] = {}
        for content in self.parts():
            for name, tensor in content.items():
                if names is None or name in names:
                    parts.setdefault(name, []).append(tensor)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each chunk, one after the other.

        Raises: ValueError if a file is damaged; FileNotFoundError if one was removed.
        """
        for number in range(_count(self.n, self.chunk_size)):
            path = chunk_path(self.directory, number)
            try:
                yield load_file(path)
            except FileNotFoundError:
                raise
            except Exception as error:  # whatever a damaged file makes the reader raise
                raise ValueError(f"'{path}' is damaged ({error}); delete it, and it is computed again") from error


def compute_chunks(
    compute: Compute,
    n: int,
    *,
    recipe: Mapping[str, Any],
    cache: Path,
    ranks: Ranks,
    label: str,
    chunk_size: int = CHUNK_SIZE,
) -> Chunks:
    """Have all chunks computed that are not there yet, by all processes together.

    Numbers depend on the recipe and the size of chunks, not on who computes which of them: bit for bit on equal devices
    with equal numbers of threads.

    Args:
        compute: Tensors of the pictures with some numbers, on the CPU; each has one row or more.
        n: Number of pictures.
        recipe: All that decides the numbers, in plain types.
        cache: Where directories of computations are; all processes must see the same.
        ranks: The processes that share the work.
        label: What the progress bar says is done.
        chunk_size: Pictures in a chunk.

    Raises: what `compute` raises; ValueError if the cache is a file; OSError if it cannot be written.
    """
    if cache.is_file():
        raise ValueError(f"cache must be a directory, '{cache}' is a file; name another one")
    whole = {"format_version": _FORMAT_VERSION, "n": n, "chunk_size": chunk_size} | dict(recipe)
    digits = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:_NAME_DIGITS]
    directory = cache / digits
    if ranks.is_first and not (directory / "recipe.json").is_file():
        write_json(directory / "recipe.json", whole)
    own = [range(i * chunk_size, min(n, (i + 1) * chunk_size)) for i in ranks.share(_count(n, chunk_size))]
    missing = [part for part in own if not chunk_path(directory, part.start // chunk_size).is_file()]
    todo = sum(map(len, missing))
    # Of several processes one speaks; the others have as much to do.
    with tqdm(desc=label, total=todo, unit=" pictures", disable=None if ranks.is_first and todo else True) as bar:
        for part in missing:
            content = {name: tensor.contiguous() for name, tensor in compute(part).items()}
            with atomic(chunk_path(directory, part.start // chunk_size)) as temporary:
                save_file(content, temporary)
            bar.update(len(part))
    ranks.wait()
    return Chunks(directory=directory, n=n, chunk_size=chunk_size)


def chunk_path(directory: Path, number: int) -> Path:
    """The file of a chunk."""
    return directory / f"{number:05d}.safetensors"


def _count(n: int, chunk_size: int) -> int:
    return -(-n // chunk_size)
