"""Samples and batches of captioned pictures, and what happens to those that cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dalle1.data.augmentation import Augmentation, augment
from dalle1.data.shards import BadSampleError, ShardIndex
from dalle1.data.transforms import crop_and_resize, decode_image, to_pixels, to_unit_interval

logger = logging.getLogger(__name__)

OnBadSample = Literal["error", "skip"]
SmallPictures = Literal["enlarge", "refuse"]
CUT_CAPTION = "caption cut"  # the one finding that does not make a sample bad


class EncodedCaption(NamedTuple):
    """What an encoder makes of one caption."""

    tokens: Tensor  # int64 (text_seq_len,)
    is_cut: bool  # the caption has more tokens than that


# From a caption and the seed of what is left to chance in encoding it, None for nothing; raises ValueError for one that
# it cannot take. Loader workers may pickle it: a function of a module or an object, not a lambda.
EncodeText = Callable[[str, str | None], EncodedCaption]


class Sample(TypedDict):
    """One captioned picture."""

    pixels: Tensor  # uint8 (3, image_size, image_size) in [0, 255]
    text_tokens: NotRequired[Tensor]  # int64 (text_seq_len,)
    caption: str
    key: str
    index: int
    # Of this sample and those that it is given instead of: number in their ShardIndex -> why it is bad, or CUT_CAPTION.
    findings: dict[int, str]


class Batch(TypedDict):
    """What a training or validation step is given."""

    image: Tensor  # float32 (b, 3, image_size, image_size) in [0, 1]
    text_tokens: NotRequired[Tensor]  # int64 (b, text_seq_len); only if the data set encodes text
    caption: list[str]  # empty strings if the data set does not encode text
    key: list[str]
    index: Tensor  # int64 (b,), numbers of the samples in their ShardIndex
    findings: dict[int, str]  # as in `Sample`, of all samples: so that workers' finds reach the main process


class PairDataset(Dataset[Sample]):
    """The samples of a `ShardIndex` with their pictures decoded and, if wanted, their captions encoded.

    Each is a function of its number, the seed and the epoch; without augmentation and `vary_text`, of its number alone.

    A sample is bad if its picture is missing or cannot be decoded (or is small, if that is refused) and, when text is
    encoded, if its caption is missing, empty, not UTF-8 or refused by the encoder. Without an encoder captions are not
    even read.

    Attributes:
        findings: The bad samples met so far, number -> what is wrong with it, and those whose caption was cut
            (CUT_CAPTION). The loaders add what their workers met, so in the main process it is complete.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        image_size: int,
        encode_text: EncodeText | None = None,
        vary_text: bool = False,
        on_bad_sample: OnBadSample = "error",
        cache_images: bool = False,
        augmentation: Augmentation = "none",
        seed: int = 0,
        background: str = "white",
        small_pictures: SmallPictures = "enlarge",
    ) -> None:
        """Read from `index`.

        Args:
            index: The samples.
            image_size: Side of the square pictures, in pixels.
            encode_text: Encodes captions; without it they are not read.
            vary_text: Encode with a seed, which is a function of `seed`, the epoch and the sample's number.
            on_bad_sample: `error` raises; `skip` takes the next sample instead, or the one after it if that is
                bad too, and logs each bad sample once (once per process if there are loader workers).
            cache_images: Keep every decoded picture in memory, 3 * image_size^2 bytes each; with augmentation,
                which starts from the whole picture, 3 * width * height. Without loader workers all epochs but the
                first decode nothing; each worker keeps pictures of its own.
            augmentation: `none` is the centred square, the same in every epoch; see `augmentation` for the others.
            seed: Decides the augmentation and how captions vary, with the epoch and the sample's number.
            background: What transparent parts of pictures show, a colour that `transforms.parse_color` takes.
            small_pictures: Whether pictures whose short side is below `image_size` are enlarged or are bad samples.
        """
        self.index = index
        self._image_size = image_size
        self._encode_text = encode_text
        self._vary_text = vary_text
        self._on_bad_sample = on_bad_sample
        self._cache: dict[int, Tensor] | None = {} if cache_images else None
        self._augmentation = augmentation
        self._seed = seed
        self._background = background
        self._small_pictures = small_pictures
        self.findings: dict[int, str] = {}

    def __len__(self) -> int:
        """Number of samples, bad ones included."""
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        """Sample `i` as in the first epoch, see `sample`."""
        return self.sample(i, epoch=0)

    def sample(self, i: int, epoch: int) -> Sample:
        """Sample `i`, or the one that replaces it; its `index` and `key` are those of the sample returned.

        Raises: BadSampleError for a bad sample if those are errors, and if all samples are bad.
        """
        findings: dict[int, str] = {}
        for distance in range(len(self)):
            candidate = (i + distance) % len(self)
            try:
                return self._load(candidate, epoch, findings)
            except BadSampleError as error:
                self._pass_over(candidate, error)
                findings[candidate] = error.kind
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
            raise BadSampleError(f"{error}; remove it, or set data.on_bad_sample=skip", error.kind) from error
        if i not in self.findings:
            self.findings[i] = error.kind
            logger.warning("skipped: %s", error)

    def _load(self, i: int, epoch: int, findings: dict[int, str]) -> Sample:
        pixels = self._pixels(i, epoch)
        sample = Sample(pixels=pixels, caption="", key=self.index.key(i), index=i, findings=findings)
        if self._encode_text is not None:
            sample["caption"] = self._caption(i)
            draw = f"{self._seed}|{epoch}|{i}" if self._vary_text else None
            try:
                sample["text_tokens"], is_cut = self._encode_text(sample["caption"], draw)
            except ValueError as error:
                message = f"caption of {self.index.describe(i)} cannot be encoded ({error})"
                raise BadSampleError(message, "caption cannot be encoded") from error
            if is_cut:
                self.findings[i] = findings[i] = CUT_CAPTION
        return sample

    def _caption(self, i: int) -> str:
        caption = self.index.caption(i)
        if not caption:
            raise BadSampleError(f"caption of {self.index.describe(i)} is empty", "empty caption")
        return caption

    def _pixels(self, i: int, epoch: int) -> Tensor:
        pixels = self._cache.get(i) if self._cache is not None else None
        if pixels is None:
            pixels = self._decode(i)
            if self._cache is not None:
                self._cache[i] = pixels
        if self._augmentation == "none":
            return pixels
        return augment(pixels, self._augmentation, image_size=self._image_size, seed=self._seed, epoch=epoch, key=i)

    def _decode(self, i: int) -> Tensor:
        """What does not change from epoch to epoch: the centred square or, for augmentation, the whole picture."""
        data = self.index.image(i)
        try:
            image = decode_image(data, self._background)
        except ValueError as error:
            message = f"picture of {self.index.describe(i)} cannot be decoded ({error})"
            raise BadSampleError(message, "picture cannot be decoded") from error
        if self._small_pictures == "refuse" and min(image.size) < self._image_size:
            raise BadSampleError(
                f"picture of {self.index.describe(i)} is too small: its short side must be at least "
                f"{self._image_size} pixels, got {min(image.size)} (data.small_pictures=enlarge takes it)",
                "picture too small",
            )
        return crop_and_resize(image, self._image_size) if self._augmentation == "none" else to_pixels(image)


def collate(samples: list[Sample]) -> Batch:
    """Samples as one batch, pictures as float32 in [0, 1]."""
    batch = Batch(
        image=to_unit_interval(torch.stack([sample["pixels"] for sample in samples])),
        caption=[sample["caption"] for sample in samples],
        key=[sample["key"] for sample in samples],
        index=torch.tensor([sample["index"] for sample in samples]),
        findings={i: kind for sample in samples for i, kind in sample["findings"].items()},
    )
    if "text_tokens" in samples[0]:
        batch["text_tokens"] = torch.stack([sample["text_tokens"] for sample in samples])
    return batch
