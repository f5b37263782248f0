"""Sets of pictures that are measured: which they are, what they are made to, and when one is another set.

A set is known by the paths of its files, their sizes and times of change, and the keys of its samples: of shards those
of each shard, of folders and tables those of each picture. Nothing of the pictures is read for that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from dalle1.data.captions import CaptionSource, draw_caption
from dalle1.data.dataset import BadSamples, OnBadSample
from dalle1.data.folders import TABLE_EXTENSIONS
from dalle1.data.raw_sample import CAPTION, BadSampleError, RawSample
from dalle1.data.sample_index import SampleIndex, Selection
from dalle1.data.sampled_picture import read_sampled_picture
from dalle1.data.sources import open_index
from dalle1.data.transforms import decode_image, fit_picture, to_pixels

MOST_THREADS = 8  # that read and decode


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What is done to a picture before anything looks at it."""

    # (height, width) in pixels of the largest centred part of that aspect, resized; None: pictures stay as they are.
    size: tuple[int, int] | None = None
    blur: float = 0.0  # radius of Pillow's GaussianBlur in pixels (its standard deviation); 0: none

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size[0]}x{self.size[1]}")
        if not 0 <= self.blur < float("inf"):
            raise ValueError(f"blur must be a radius >= 0 in pixels, got {self.blur}")

    def __call__(self, picture: Image.Image) -> UInt8[Tensor, "3 h w"]:
        """An RGB picture, treated."""
        pixels = to_pixels(picture).contiguous() if self.size is None else fit_picture(picture, *self.size)
        if not self.blur:
            return pixels
        fitted = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        return to_pixels(fitted.filter(ImageFilter.GaussianBlur(self.blur))).contiguous()

    @property
    def facts(self) -> dict[str, Any]:
        """It in plain types."""
        return {"size": None if self.size is None else list(self.size), "blur": self.blur}


class PictureSet:
    """Pictures in a fixed order, and perhaps their captions."""

    def __init__(
        self,
        samples: SampleIndex | Sequence[RawSample],
        *,
        captions: Sequence[str] | None = None,
        caption: str = "text",
        on_bad_sample: OnBadSample | None = None,
    ) -> None:
        """These samples.

        Args:
            samples: Not read yet; an index of millions takes less memory than a list of them.
            captions: One for each; without, they are those of the samples.
            caption: Where captions of samples stand, as `data.captions.CaptionSource` takes it; of several the first
                counts.
            on_bad_sample: What users asked for about pictures that cannot be decoded, which errors name as the way out
                and `readable_pictures.readable` does; None where they cannot ask.

        Raises: ValueError if there is none; as `CaptionSource`.
        """
        if not len(samples):
            raise ValueError("a set must have at least one picture, got none")
        self.samples = samples
        self._captions = captions
        self._source = CaptionSource(setting=caption)
        self.on_bad_sample = on_bad_sample
        self._n_skipped = 0

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.samples)

    @cached_property
    def captions(self) -> list[str]:
        """Of each picture: its sample's, else the prompt that it was sampled with.

        Raises: ValueError if a picture has none.
        """
        return list(self._captions) if self._captions is not None else list(map(self._caption, self.samples))

    def _caption(self, sample: RawSample) -> str:
        if self._source.setting != "text" or sample.part(CAPTION) is not None:
            return draw_caption(self._source.read(sample), None)
        sampled = read_sampled_picture(sample.image())
        if sampled is None:
            raise ValueError(f"{sample.describe()} has no caption; write one into a .txt file of its name")
        return sampled.prompt

    @cached_property
    def sha256(self) -> str:
        """Hash of all that says which pictures they are (see the module's docstring)."""
        digest, states = hashlib.sha256(), dict[str, str]()
        folders = {container: Path(container).is_dir() for container in {sample.container for sample in self.samples}}
        for sample in self.samples:
            path = _file_of(sample, in_folder=folders[sample.container])
            if path not in states:
                states[path] = f"{os.path.realpath(path)}|{_state_of(path)}"
            digest.update(f"{states[path]}|{sample.key}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, in plain types."""
        containers = list(dict.fromkeys(sample.container for sample in self.samples))
        shown = containers if len(containers) <= 4 else [*containers[:2], "...", containers[-1]]
        facts = {"places": shown, "n_pictures": len(self), "sha256": self.sha256}
        return facts if self.on_bad_sample is None else facts | {"skipped": self._n_skipped}

    def keep(self, rows: np.ndarray) -> PictureSet:
        """The pictures with these numbers, int64 (n,) and ascending; in its facts all others are skipped ones."""
        assert isinstance(self.samples, SampleIndex), "opened by open_pictures"
        assert self._captions is None, "opened by open_pictures"
        kept = PictureSet(Selection(self.samples, rows), caption=self._source.setting, on_bad_sample=self.on_bad_sample)
        kept._n_skipped = len(self) - len(rows)
        return kept

    def rows_without(self, keys: Sequence[str]) -> list[int]:
        """Numbers of the pictures whose key is not among `keys`.

        Raises: ValueError if some of `keys` are no pictures of the set, or none is left.
        """
        wanted = set(keys)
        if unknown := sorted(wanted - {sample.key for sample in self.samples}):
            raise ValueError(
                f"keys to leave out must be those of pictures of the set, {len(unknown)} are not, such as "
                f"{unknown[0]!r}; give the file that was made for it"
            )
        rows = [i for i, sample in enumerate(self.samples) if sample.key not in wanted]
        if not rows:
            raise ValueError(f"some pictures must be left, got {len(wanted)} keys to leave out, which are all")
        return rows

    def decoded(self, numbers: range, treatment: Treatment, *, at_once: int) -> Iterator[list[Tensor]]:
        """The treated pictures with these numbers, uint8 (3, h, w) each, in groups of `at_once`.

        Raises: ValueError or OSError with one sentence if one cannot be read.
        """
        groups = [numbers[first : first + at_once] for first in range(0, len(numbers), at_once)]
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:

            def begin(group: range) -> list[Any]:
                return [pool.submit(self._decode, i, treatment) for i in group]

            following = begin(groups[0])
            for group in groups[1:]:
                current, following = following, begin(group)  # decoded while the current ones are looked at
                yield [future.result() for future in current]
            yield [future.result() for future in following]

    def fault(self, i: int) -> BadSampleError | None:
        """What is wrong with picture number `i`; None if it can be decoded."""
        try:
            self._picture(i)
        except BadSampleError as error:
            return error
        return None

    def _decode(self, i: int, treatment: Treatment) -> Tensor:
        try:
            return treatment(self._picture(i))
        except BadSampleError as error:
            if self.on_bad_sample is None:
                raise BadSampleError(f"{error}; mend it or remove it", error.kind) from error
            BadSamples("error", option="on_bad_sample").pass_over(error)
            raise

    def _picture(self, i: int) -> Image.Image:
        """Decoded, RGB. Raises: BadSampleError if it cannot be read or decoded."""
        sample = self.samples[i]
        data = sample.image()
        try:
            return decode_image(data)
        except ValueError as error:
            message = f"the picture of {sample.describe()} cannot be decoded ({error})"
            raise BadSampleError(message, "picture cannot be decoded") from error


def open_pictures(
    patterns: Sequence[str], *, caption: str = "text", on_bad_sample: OnBadSample | None = None
) -> PictureSet:
    """The pictures in tar shards, folders and tables that paths or globs name.

    `caption` and `on_bad_sample` as `PictureSet` takes them; with `skip` what is whole of damaged shards counts.

    Raises: ValueError, TypeError or OSError as `data.sources.open_index` and `PictureSet`.
    """
    index = open_index(patterns, skip_damage=on_bad_sample == "skip")
    return PictureSet(index, caption=caption, on_bad_sample=on_bad_sample)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of `256` or `192x256`. Raises: ValueError for anything else."""
    parts = text.split("x")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts) or len(parts) > 2:
        raise ValueError(f"size must be a side or HEIGHTxWIDTH in pixels, such as 256 or 192x256, got {text!r}")
    return int(parts[0]), int(parts[-1])


def _file_of(sample: RawSample, *, in_folder: bool) -> str:
    """The file whose change is the picture's."""
    if in_folder:
        return os.path.join(sample.container, sample.key)
    if sample.container.lower().endswith(TABLE_EXTENSIONS):
        return os.path.join(os.path.dirname(sample.container), sample.key)
    return sample.container


def _state_of(path: str) -> str:
    """Size and time of change of a file; a table may name one that is not there, which reading it will say."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return "absent"
    return f"{state.st_size}|{state.st_mtime_ns}"
