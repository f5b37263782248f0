"""One captioned picture as it lies in its files: nothing of it has been decoded yet."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# The parts of a sample. Image tokens stand for the picture in what stage=tokens writes.
PICTURE, CAPTION, METADATA, TOKENS = range(4)
N_PARTS = 4
PART_OF_EXTENSION = {
    "jpg": PICTURE,
    "jpeg": PICTURE,
    "png": PICTURE,
    "webp": PICTURE,
    "txt": CAPTION,
    "json": METADATA,
    "npy": TOKENS,
}
PICTURE_EXTENSIONS = tuple(f".{extension}" for extension, part in PART_OF_EXTENSION.items() if part == PICTURE)
PART_NAMES = ("picture", "caption (.txt)", "metadata file (.json)", "file of image tokens (.npy)")
# Far above any good one, so that a hostile or broken shard cannot fill the memory. A picture of 100 megapixels, the
# most that are decoded, has 300 MB uncompressed.
MAX_PART_BYTES = (1 << 29, 1 << 20, 1 << 20, 1 << 24)


CANNOT_BE_READ = "cannot be read"  # the kind of bad sample that may be good at another time

_LONGEST_KEY = 200  # characters of it that messages have; findings are kept in checkpoints


class BadSampleError(ValueError):
    """A sample that cannot be used. The message is one sentence that names its key and where it is."""

    def __init__(self, message: str, kind: str = "unusable sample") -> None:
        """`kind` says in a few words what is wrong; bad samples are counted by it."""
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample; its parts are read when they are asked for, and again each time."""

    key: str
    container: str  # path or address of the shard, folder or list that it is in
    # At most so many bytes of a part, None if there is none; raises OSError.
    read_part: Callable[[int, int], bytes | None]

    def describe(self) -> str:
        """Words that find the sample again, for messages."""
        key = self.key if len(self.key) <= _LONGEST_KEY else f"{self.key[:_LONGEST_KEY]}..."
        return f"sample {key!r} in {self.container!r}"

    def part(self, part: int) -> bytes | None:
        """The bytes of a part; None if the sample has none.

        Raises: BadSampleError if it cannot be read or is larger than any good one; OSError if this process may open no
            more files, which is no fault of the sample's.
        """
        try:
            # One byte more than allowed is enough to see that it is too large.
            data = self.read_part(part, MAX_PART_BYTES[part] + 1)
        except (OSError, ValueError) as error:  # a table may name a path that none can be
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise OSError(error.errno, "too many files are open; allow more, `ulimit -n 4096`") from error
            message = f"{self.describe()} cannot be read ({getattr(error, 'strerror', None) or error})"
            raise BadSampleError(message, CANNOT_BE_READ) from error
        if data is not None and len(data) > MAX_PART_BYTES[part]:
            raise BadSampleError(
                f"the {PART_NAMES[part]} of {self.describe()} must have at most {MAX_PART_BYTES[part]:,} bytes, got "
                f"{len(data):,}",
                f"{PART_NAMES[part].partition(' (')[0]} too large",
            )
        return data

    def head_of_image(self, n_bytes: int) -> bytes:
        """The beginning of the picture file; nothing if there is none or it cannot be read."""
        try:
            return self.read_part(PICTURE, n_bytes) or b""
        except (OSError, ValueError):
            return b""

    def image(self) -> bytes:
        """The undecoded picture file. Raises: BadSampleError if it has none."""
        data = self.part(PICTURE)
        if data is None:
            extensions = f"{', '.join(PICTURE_EXTENSIONS[:-1])} or {PICTURE_EXTENSIONS[-1]}"
            raise BadSampleError(f"{self.describe()} has no picture ({extensions})", "no picture")
        return data

    def text(self) -> str:
        """The caption file's text, without white space around it; may be empty.

        Raises: BadSampleError if there is none or it is not UTF-8.
        """
        data = self.part(CAPTION)
        if data is None:
            raise BadSampleError(f"{self.describe()} has no caption (.txt)", "no caption")
        try:
            return data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            message = f"caption of {self.describe()} is not UTF-8 text ({error})"
            raise BadSampleError(message, "caption not UTF-8") from error

    def metadata(self) -> dict[str, Any]:
        """The `.json`; empty if it has none.

        Raises: BadSampleError if it is not a JSON object.
        """
        data = self.part(METADATA)
        if data is None:
            return {}
        try:
            metadata = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSampleError(f"metadata of {self.describe()} is not JSON ({error})", "metadata not JSON") from error
        if not isinstance(metadata, dict):
            message = f"metadata of {self.describe()} must be a JSON object, got {type(metadata).__name__}"
            raise BadSampleError(message, "metadata not an object")
        return metadata

    def image_tokens(self) -> np.ndarray:
        """The image tokens of all crops, uint16 (crops, gh, gw).

        Raises: BadSampleError if it has none, or they are no such array.
        """
        data = self.part(TOKENS)
        if data is None:
            raise BadSampleError(f"{self.describe()} has no image tokens (.npy)", "no image tokens")
        try:
            tokens = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # a damaged header can raise anything
            reason = " ".join(str(error).split())
            message = f"image tokens of {self.describe()} cannot be read ({reason})"
            raise BadSampleError(message, "image tokens damaged") from error
        if tokens.dtype != np.uint16 or tokens.ndim != 3 or tokens.size == 0:
            raise BadSampleError(
                f"image tokens of {self.describe()} must be uint16 (crops, rows, columns), got {tokens.dtype} "
                f"{tokens.shape}",
                "image tokens damaged",
            )
        return tokens
