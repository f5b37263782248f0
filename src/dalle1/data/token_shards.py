"""Image tokens in shards: what `stage=tokens` writes and `data.tokens=` reads.

A directory with `tokens.json`, which says what the tokens are, and tar shards in the usual layout, in which a sample
has `key.npy` instead of a picture: uint16 (crops, rows, columns), each crop the picture in another draw of the
augmentation. Captions and metadata are those of the source, as they were. One shard is written for each block of the
source, under its final name only when it is complete; so what is there is whole, and a stopped run goes on with the
others.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset import TarWriter

from dalle1.atomic_files import atomic, write_json
from dalle1.data.shard_scan import leads_out, split_name
from dalle1.data.shards import ShardIndex
from dalle1.data.sources import Split

MANIFEST = "tokens.json"
FORMAT_VERSION = 1
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """What decides the tokens in a directory."""

    dvae_sha256: str
    vocab_size: int
    grid: list[int]  # rows, columns
    image_size: int  # pixels a side
    crops: int  # of each training picture; a validation picture has its centred square
    augmentation: str
    background: str
    small_pictures: str
    seed: int
    caption: str
    filters: dict[str, Any]
    samples_sha256: dict[str, str]  # split -> hash of what there is to encode: blocks, and the first key of each
    # Split -> how many shards each source gave, and how often their samples come in an epoch.
    n_shards: dict[str, list[int]]
    weights: dict[str, list[float]]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse what no encoding writes. Raises: TypeError or ValueError."""
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid must have rows and columns, got {self.grid}")
        for name in ("samples_sha256", "n_shards", "weights"):
            if set(getattr(self, name)) != set(SPLITS):
                raise ValueError(f"{name} must have {' and '.join(SPLITS)}, got {getattr(self, name)}")

    def shards(self, directory: str | Path, split: Split) -> list[list[str]]:
        """Paths of the shards of each source of a split."""
        paths, first = [], 0
        for count in self.n_shards[split]:
            paths.append([str(shard_path(directory, split, number)) for number in range(first, first + count)])
            first += count
        return paths


def shard_path(directory: str | Path, split: Split, number: int) -> Path:
    """Where the tokens of a block of a split are, by the block's number."""
    return Path(directory, f"{split}-{number:05d}.tar")


def write_manifest(directory: str | Path, manifest: TokenManifest) -> None:
    """Say what will be in `directory`, or check that it is what an earlier start has said.

    Raises: ValueError if it holds other tokens.
    """
    path = Path(directory, MANIFEST)
    if not path.exists():
        write_json(path, asdict(manifest))
        return
    there, wanted = asdict(read_manifest(directory)), asdict(manifest)
    changes = [
        f"{name} ({_short(there[name])}, not {_short(wanted[name])})" for name in wanted if there[name] != wanted[name]
    ]
    if changes:
        raise ValueError(
            f"'{directory}' holds tokens with another {' and another '.join(changes)}; "
            "delete it, or choose another name="
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_manifest(directory: str | Path) -> TokenManifest:
    """What the tokens in `directory` are.

    Raises: FileNotFoundError if it holds none; ValueError if its manifest is damaged or of another version.
    """
    path = Path(directory, MANIFEST)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.tokens must be a directory that stage=tokens has written, there is no '{path}'; correct the path, "
            "or run stage=tokens first"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version == FORMAT_VERSION:
            return TokenManifest(**content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged ({error}); delete the directory and run stage=tokens again") from error
    raise ValueError(f"'{path}' must have format version {FORMAT_VERSION}, got {version!r}; make the tokens again")


def open_tokens(directory: str | Path, manifest: TokenManifest, split: Split) -> list[ShardIndex]:
    """The samples of each source of a split.

    Raises: ValueError if shards are missing or damaged, or a source has no sample.
    """
    sources = manifest.shards(directory, split)
    missing = [path for source in sources for path in source if not Path(path).exists()]
    if missing:
        raise ValueError(
            f"'{directory}' must hold all tokens, it lacks {len(missing)} of {sum(map(len, sources))} shards of "
            f"{split}, the first '{missing[0]}'; run stage=tokens again, it goes on where it stopped"
        )
    return [ShardIndex(source) for source in sources]


class EncodedSample(NamedTuple):
    """A sample whose picture has become tokens."""

    key: str
    tokens: np.ndarray  # uint16 (crops, rows, columns)
    text: bytes | None  # its .txt, as it was
    metadata: bytes | None  # its .json, as it was


def write_token_shard(path: Path, samples: Iterable[EncodedSample]) -> int:
    """Write one shard of samples, and return their number."""
    keys: set[str] = set()
    with atomic(path) as temporary, open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            key, number = sample.key, len(keys)
            # Keys of folders and tables are paths with extensions, which are no keys of a shard.
            is_key = split_name(f"{key}.npy") == (key, "npy") and not leads_out(key)
            while not is_key or key in keys:
                key, number, is_key = f"{number:09d}", number + 1, True
            keys.add(key)
            array = io.BytesIO()
            np.lib.format.write_array(array, sample.tokens, allow_pickle=False)
            files: dict[str, Any] = {"__key__": key, "npy": array.getvalue()}
            files |= {"txt": sample.text} if sample.text is not None else {}
            files |= {"json": sample.metadata} if sample.metadata is not None else {}
            tar.write(files)
    return len(keys)
