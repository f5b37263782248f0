"""What a data set is: what is counted of its samples, each of which is looked at once."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import cast

import numpy as np

from dalle1.data.captions import CaptionSource
from dalle1.data.facts import read_facts
from dalle1.data.fields import require_int
from dalle1.data.filters import FilterConfig, reason_to_drop
from dalle1.data.near_duplicates import hash_file
from dalle1.data.raw_sample import (
    MAX_PART_BYTES,
    METADATA,
    N_PARTS,
    PICTURE,
    TOKENS,
    BadSampleError,
    RawSample,
)
from dalle1.data.shard_scan import Damage
from dalle1.data.tallies import Distribution, Examples, Fields, FrequentTexts, Mention, Repeats, hash_bits
from dalle1.data.transforms import decode_image, picture_size

NEAR_DUPLICATE = "near-duplicate"
# Kinds of bad samples, as `RawSample` and `CaptionSource` name them.
NO_PICTURE, NO_CAPTION = "no picture", "no caption"
MOST_DRAWN = 1000
_NAMED = 5  # samples of a kind that are named
MOST_SHOWN = 6  # samples of a reason to drop that are shown
_PLAIN = 4  # of 255 levels, within which compression may change one colour
_LONGEST_NOTE = 100  # characters of a caption

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
)
_BOXED = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC"}  # after "ftyp"


@dataclass(frozen=True, kw_only=True)
class SurveyOptions:
    """What to look at more closely."""

    caption: CaptionSource = field(default_factory=CaptionSource)
    filters: FilterConfig = field(default_factory=FilterConfig)
    decode: int | None = 2000  # pictures, drawn evenly, that are decoded to the end; None: all
    samples: int = 24  # drawn at random to be shown
    seed: int = 0  # decides which are drawn
    image_size: int = 256  # pictures with a shorter side below it are counted

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type (TypeError) or outside their range (ValueError)."""
        require_int("decode", 0 if self.decode is None else self.decode, at_least=0)
        for name, least in (("samples", 0), ("seed", 0), ("image_size", 1)):
            require_int(name, getattr(self, name), at_least=least)
        if self.samples > MOST_DRAWN:
            raise ValueError(f"samples must be <= {MOST_DRAWN:,}, got {self.samples:,}; look at them in several runs")
        if not isinstance(self.filters, FilterConfig):
            raise TypeError(f"filters must be a FilterConfig, got {self.filters!r}")


class TokenCounts:
    """The image tokens that stand for pictures.

    Attributes:
        crops: Samples by how many crops they have.
        grids: Samples by rows and columns, such as "32 x 32".
        codes: How often each code occurs, int64 (highest code + 1,).
    """

    def __init__(self) -> None:
        """None yet."""
        self.crops: Counter[int] = Counter()
        self.grids: Counter[str] = Counter()
        self.codes = np.zeros(0, dtype=np.int64)

    def add(self, tokens: np.ndarray) -> None:
        """Count the tokens of a sample, uint16 (crops, rows, columns)."""
        self.crops[tokens.shape[0]] += 1
        self.grids[f"{tokens.shape[1]} x {tokens.shape[2]}"] += 1
        self._add(np.bincount(tokens.ravel()))

    def merge(self, other: TokenCounts) -> None:
        """Count all that `other` has counted."""
        self.crops.update(other.crops)
        self.grids.update(other.grids)
        self._add(other.codes)

    def _add(self, counts: np.ndarray) -> None:
        missing = len(counts) - len(self.codes)
        if missing > 0:
            self.codes = np.pad(self.codes, (0, missing))
        self.codes[: len(counts)] += counts


def _examples() -> Examples:
    return Examples(_NAMED)


@dataclass(kw_only=True)
class Survey:
    """What was counted, of a part or of the whole."""

    drawn: Examples  # to be shown, all of one kind
    dropped: Examples = field(default_factory=lambda: Examples(MOST_SHOWN))  # by reason, drawn at random
    n_samples: int = 0
    containers: Counter[str] = field(default_factory=Counter)  # samples of each shard, folder and table
    n_parts: Counter[int] = field(default_factory=Counter)  # samples that have each part
    n_bytes: Counter[int] = field(default_factory=Counter)  # of each part
    damages: Examples = field(default_factory=_examples)  # of shards
    n_bad: int = 0  # samples with anything wrong; no caption is nothing wrong if none has one
    n_only_without_caption: int = 0  # of those
    bad: Examples = field(default_factory=_examples)  # samples by what is wrong, the first of each kind
    keys: Repeats = field(default_factory=Repeats)

    formats: Counter[str] = field(default_factory=Counter)  # by content, bad ones too
    short_sides: Distribution = field(default_factory=Distribution)  # pixels
    aspects: Distribution = field(default_factory=Distribution)  # longer over shorter side
    file_bytes: Distribution = field(default_factory=Distribution)
    n_small: int = 0  # a side below image_size
    n_decoded: int = 0
    n_broken: int = 0  # of those that were decoded, with a good header
    n_plain: int = 0  # of those that were decoded, of one colour
    files: Repeats = field(default_factory=Repeats)  # the bytes of picture files

    n_with_caption: int = 0
    words: Distribution = field(default_factory=Distribution)  # of each caption
    characters: Distribution = field(default_factory=Distribution)
    captions: Repeats = field(default_factory=Repeats)
    frequent: FrequentTexts = field(default_factory=FrequentTexts)

    metadata: Fields = field(default_factory=Fields)
    tokens: TokenCounts = field(default_factory=TokenCounts)
    extremes: Examples = field(default_factory=_examples)  # the most extreme of each kind
    hashed: array[int] = field(default_factory=lambda: array("Q"))  # numbers of samples, and the hash of each
    hashes: array[int] = field(default_factory=lambda: array("Q"))

    @classmethod
    def empty(cls, options: SurveyOptions) -> Survey:
        """Of no samples."""
        return cls(drawn=Examples(options.samples))

    def merge(self, other: Survey) -> None:
        """Count all that `other` has counted, of the samples that come next."""
        for each in fields(self):
            mine, its = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, int):
                setattr(self, each.name, mine + its)
            elif isinstance(mine, Counter):
                mine.update(its)
            elif isinstance(mine, array):
                mine.extend(its)
            else:
                mine.merge(its)

    @property
    def has_captions(self) -> bool:
        """Whether any sample has one that is good."""
        return self.n_with_caption > 0

    @property
    def shown(self) -> list[Mention]:
        """The samples that were drawn, in their order."""
        return sorted(self.drawn.of(""), key=lambda mention: mention.number)

    def note(self, damage: Damage) -> None:
        """Count what is wrong with a shard."""
        number = self.damages.counts.total()
        self.damages.add(damage.kind, number, Mention(number=number, key="", container="", note=damage.message))


class Surveyor:
    """Looks at samples one by one; can be pickled."""

    def __init__(self, options: SurveyOptions, *, keeps_raw: bool = False) -> None:
        self._options = options
        self._keeps_raw = keeps_raw
        self._reason = reason_to_drop(options.filters)

    def __call__(self, samples: Iterable[tuple[int, RawSample, bool]]) -> Survey:
        """Look at samples, each with its number and whether its picture is decoded."""
        survey = Survey.empty(self._options)
        for number, raw, decodes in samples:
            held = RawSample(key=raw.key, container=raw.container, read_part=_ReadOnce(raw))
            self._look(survey, Mention(number=number, key=raw.key, container=raw.container), held, decodes)
        return survey

    def _look(self, survey: Survey, mention: Mention, raw: RawSample, decodes: bool) -> None:
        survey.n_samples += 1
        survey.containers[raw.container] += 1
        survey.keys.add(raw.key.encode("utf-8", "surrogatepass"), mention.number)
        parts = [part for part in range(N_PARTS) if _has(survey, raw, part)]
        wrong: dict[str, str] = {}  # kind -> sentence
        if PICTURE in parts or TOKENS not in parts:
            with _noted(wrong):
                self._look_at_picture(survey, mention, raw, decodes)
        with _noted(wrong):
            self._look_at_captions(survey, mention, raw)
        if METADATA in parts:
            with _noted(wrong):
                survey.metadata.add(raw.metadata())
        if TOKENS in parts:
            with _noted(wrong):
                survey.tokens.add(raw.image_tokens())
        for kind, sentence in wrong.items():
            survey.bad.add(kind, mention.number, replace(mention, note=sentence))
        survey.n_bad += bool(wrong)
        survey.n_only_without_caption += wrong.keys() == {NO_CAPTION}
        self._judge(survey, mention, raw)

    def _look_at_picture(self, survey: Survey, mention: Mention, raw: RawSample, decodes: bool) -> None:
        """Raises: BadSampleError if there is no good one."""
        data = raw.image()
        survey.formats[_format(data)] += 1
        survey.files.add(data, mention.number)
        survey.file_bytes.add(len(data))
        note = f"{len(data):,} bytes"
        try:
            width, height = picture_size(data)
            note = f"{width:,} x {height:,} pixels, {note}"
            self._count_size(survey, width, height, replace(mention, note=note))
            if decodes:
                _decode(survey, data)
        except ValueError as error:
            sentence = f"picture of {raw.describe()} cannot be decoded ({error})"
            raise BadSampleError(sentence, "picture cannot be decoded") from error
        finally:
            survey.extremes.add("smallest files", len(data), replace(mention, note=note))
            survey.extremes.add("largest files", -len(data), replace(mention, note=note))

    def _count_size(self, survey: Survey, width: int, height: int, mention: Mention) -> None:
        shorter, longer = sorted((width, height))
        survey.short_sides.add(shorter)
        survey.aspects.add(longer / shorter)
        survey.n_small += shorter < self._options.image_size
        survey.extremes.add("fewest pixels", width * height, mention)
        survey.extremes.add("most pixels", -width * height, mention)
        survey.extremes.add("most extreme aspect", -longer / shorter, mention)

    def _look_at_captions(self, survey: Survey, mention: Mention, raw: RawSample) -> None:
        """Raises: BadSampleError if there is none that is good."""
        for caption in self._options.caption.read(raw):
            survey.characters.add(len(caption))
            # Counted as filters count them.
            survey.words.add(sum(any(map(str.isalnum, word)) for word in caption.split()))
            survey.captions.add(caption.encode(), mention.number)
            survey.frequent.add(caption)
            quoted = replace(mention, note=caption[:_LONGEST_NOTE])
            survey.extremes.add("shortest captions", len(caption), quoted)
            survey.extremes.add("longest captions", -len(caption), quoted)
        survey.n_with_caption += 1

    def _judge(self, survey: Survey, mention: Mention, raw: RawSample) -> None:
        """Whether filters drop a sample, and whether chance shows it."""
        options = self._options
        try:
            reason = self._reason(read_facts(raw, options.caption, options.filters))
        except BadSampleError:  # bad samples are no matter of filters
            reason = None
        if reason is None and options.filters.near_duplicates is not None:
            try:
                bits = hash_file(raw.image())
            except ValueError:  # bad samples are no matter of filters
                pass
            else:
                survey.hashed.append(mention.number)
                survey.hashes.append(bits)
        shown = replace(mention, note=reason or "", raw=raw if self._keeps_raw else None)
        rank = chance(options.seed, mention.number)
        survey.drawn.add("", rank, shown)
        if reason is not None:
            survey.dropped.add(reason, rank, shown)


@contextmanager
def _noted(wrong: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except BadSampleError as error:
        wrong[error.kind] = str(error)


def _decode(survey: Survey, data: bytes) -> None:
    """Raises: ValueError if that cannot be done."""
    survey.n_decoded += 1
    try:
        image = decode_image(data)
    except ValueError:
        survey.n_broken += 1
        raise
    levels = cast("tuple[tuple[int, int], ...]", image.getextrema())
    survey.n_plain += all(high - low <= _PLAIN for low, high in levels)


def chance(seed: int, number: int) -> int:
    """A number for sample `number`: those with the lowest ones are drawn."""
    return hash_bits(f"{seed}|{number}".encode())


class _ReadOnce:
    """Gives the parts of a sample, each of which is read from its file only once."""

    def __init__(self, raw: RawSample) -> None:
        self._raw = raw
        self._parts: dict[int, bytes | OSError | None] = {}

    def __call__(self, part: int, n_bytes: int) -> bytes | None:
        if part not in self._parts:
            try:
                # One byte more than allowed, by which it is seen to be too large.
                self._parts[part] = self._raw.read_part(part, MAX_PART_BYTES[part] + 1)
            except OSError as error:
                self._parts[part] = error
        data = self._parts[part]
        if isinstance(data, OSError):
            raise data
        return None if data is None else data[:n_bytes]


def _has(survey: Survey, raw: RawSample, part: int) -> bool:
    """Count a part; whether there is something to look at."""
    try:
        data = raw.read_part(part, MAX_PART_BYTES[part] + 1)
    except OSError:
        return True
    if data is None:
        return False
    survey.n_parts[part] += 1
    survey.n_bytes[part] += len(data)
    return True


def _format(data: bytes) -> str:
    """What a file is by its content."""
    if not data:
        return "empty"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        return _BOXED.get(data[8:12], "another")
    start = data[:1000].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if start.startswith((b"<?xml", b"<svg")) and b"<svg" in start:
        return "SVG"
    return next((name for signature, name in _SIGNATURES if data.startswith(signature)), "another")
