"""Samples and batches of captioned pictures, and what happens to those that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dalle1.data.shards import BadSampleError, ShardIndex
from dalle1.data.transforms import crop_and_resize, decode_image, to_unit_interval

logger = logging.getLogger(__name__)

OnBadSample = Literal["error", "skip"]


class Sample(TypedDict):
    """One captioned picture."""

    pixels: Tensor  # uint8 (3, image_size, image_size) in [0, 255]
    text_tokens: NotRequired[Tensor]  # int64 (text_seq_len,)
    caption: str
    key: str
    index: int


class Batch(TypedDict):
    """What a training or validation step is given."""

    image: Tensor  # float32 (b, 3, image_size, image_size) in [0, 1]
    text_tokens: NotRequired[Tensor]  # int64 (b, text_seq_len); only if the data set encodes text
    caption: list[str]  # empty strings if the data set does not encode text
    key: list[str]
    index: Tensor  # int64 (b,), numbers of the samples in their ShardIndex


class PairDataset(Dataset[Sample]):
    """The samples of a `ShardIndex` with their pictures decoded and, if wanted, their captions encoded.

    A sample is bad if its picture is missing or cannot be decoded and, when text is encoded, if its caption is
    missing, empty, not UTF-8 or refused by the encoder. Without an encoder captions are not even read.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        image_size: int,
        encode_text: Callable[[list[str]], Tensor] | None = None,
        on_bad_sample: OnBadSample = "error",
        cache_images: bool = False,
    ) -> None:
        """Read from `index`.

        Args:
            index: The samples.
            image_size: Side of the square pictures, in pixels.
            encode_text: n captions to int64 (n, text_seq_len); raises ValueError for a caption that it cannot
                take. Loader workers may pickle it: give a function of a module or a method, not a lambda.
            on_bad_sample: `error` raises; `skip` takes the next sample instead, or the one after it if that is
                bad too, and logs each bad sample once (once per process if there are loader workers).
            cache_images: Keep every decoded picture in memory, 3 * image_size^2 bytes each. Without loader
                workers all epochs but the first decode nothing; each worker keeps pictures of its own.
        """
        self.index = index
        self._image_size = image_size
        self._encode_text = encode_text
        self._on_bad_sample = on_bad_sample
        self._cache: dict[int, Tensor] | None = {} if cache_images else None
        self._logged: set[int] = set()

    def __len__(self) -> int:
        """Number of samples, bad ones included."""
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        """Sample `i`, or the one that replaces it; its `index` and `key` are those of the sample returned.

        Raises: BadSampleError for a bad sample if those are errors, and if all samples are bad.
        """
        for distance in range(len(self)):
            candidate = (i + distance) % len(self)
            try:
                return self._load(candidate)
            except BadSampleError as error:
                self._pass_over(candidate, error)
                last_error = error
        raise BadSampleError(f"at least one sample must be good, got {len(self)} bad ones; the last: {last_error}")

    def captions(self) -> Iterator[str]:
        """All good captions in the order of the shards, to train a tokenizer on; no picture is read.

        Raises: BadSampleError for a missing, empty or undecodable caption if bad samples are errors.
        """
        for i in range(len(self)):
            try:
                caption = self._caption(i)
            except BadSampleError as error:
                self._pass_over(i, error)
            else:
                yield caption

    def _pass_over(self, i: int, error: BadSampleError) -> None:
        if self._on_bad_sample == "error":
            raise BadSampleError(f"{error}; remove it, or set data.on_bad_sample=skip") from error
        if i not in self._logged:
            self._logged.add(i)
            logger.warning("skipped: %s", error)

    def _load(self, i: int) -> Sample:
        sample = Sample(pixels=self._pixels(i), caption="", key=self.index.key(i), index=i)
        if self._encode_text is not None:
            sample["caption"] = self._caption(i)
            try:
                sample["text_tokens"] = self._encode_text([sample["caption"]])[0]
            except ValueError as error:
                raise BadSampleError(f"caption of {self.index.describe(i)} cannot be encoded ({error})") from error
        return sample

    def _caption(self, i: int) -> str:
        caption = self.index.caption(i)
        if not caption:
            raise BadSampleError(f"caption of {self.index.describe(i)} is empty")
        return caption

    def _pixels(self, i: int) -> Tensor:
        if self._cache is not None and i in self._cache:
            return self._cache[i]
        data = self.index.image(i)
        try:
            pixels = crop_and_resize(decode_image(data), self._image_size)
        except ValueError as error:
            raise BadSampleError(f"picture of {self.index.describe(i)} cannot be decoded ({error})") from error
        if self._cache is not None:
            self._cache[i] = pixels
        return pixels


def collate(samples: list[Sample]) -> Batch:
    """Samples as one batch, pictures as float32 in [0, 1]."""
    batch = Batch(
        image=to_unit_interval(torch.stack([sample["pixels"] for sample in samples])),
        caption=[sample["caption"] for sample in samples],
        key=[sample["key"] for sample in samples],
        index=torch.tensor([sample["index"] for sample in samples]),
    )
    if "text_tokens" in samples[0]:
        batch["text_tokens"] = torch.stack([sample["text_tokens"] for sample in samples])
    return batch
