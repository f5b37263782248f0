"""What filters need to know of a sample, and no more than that is read."""

from __future__ import annotations

from dalle1.data.captions import CaptionSource
from dalle1.data.filters import FilterConfig, SampleFacts
from dalle1.data.raw_sample import CANNOT_BE_READ, BadSampleError, RawSample
from dalle1.data.transforms import picture_size

# Where the sizes of nearly all pictures stand; of those with large profiles before them the whole file is read.
_HEAD_BYTES = 1 << 14


def read_facts(raw: RawSample, caption: CaptionSource, config: FilterConfig) -> SampleFacts:
    """What `config` looks at; of several captions the first. What is missing or damaged is unknown.

    Raises: BadSampleError if something is there but cannot be read.
    """
    width = height = None
    if config.needs_size and (size := read_size(raw)):
        width, height = size
    return SampleFacts(
        caption=_caption(raw, caption) if config.needs_caption else None,
        width=width,
        height=height,
        metadata=_metadata(raw) if config.needs_metadata else {},
    )


def _caption(raw: RawSample, caption: CaptionSource) -> str | None:
    try:
        return caption.read(raw)[0]
    except BadSampleError as error:
        _raise_if_unread(error)
        return None


def read_size(raw: RawSample) -> tuple[int, int] | None:
    """Width and height of a picture as it is seen, if there is one; it is not decoded.

    Raises: BadSampleError if there is one that cannot be read.
    """
    try:
        return picture_size(raw.head_of_image(_HEAD_BYTES))
    except ValueError:
        pass
    try:
        return picture_size(raw.image())
    except ValueError as error:
        _raise_if_unread(error)
        return None


def _metadata(raw: RawSample) -> dict[str, object]:
    try:
        return raw.metadata()
    except BadSampleError as error:
        _raise_if_unread(error)
        return {}


def _raise_if_unread(error: ValueError) -> None:
    if isinstance(error, BadSampleError) and error.kind == CANNOT_BE_READ:
        raise error
