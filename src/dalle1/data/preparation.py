"""From a raw sample to what a network is given: the square picture or its tokens, and the caption as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from dalle1.data.augmentation import Augmentation, augment_file_epochs
from dalle1.data.captions import CaptionSource, draw_caption
from dalle1.data.findings import CUT_CAPTION
from dalle1.data.raw_sample import BadSampleError, RawSample
from dalle1.data.transforms import crop_and_resize, decode_image, picture_size

SmallPictures = Literal["enlarge", "refuse"]


class EncodedCaption(NamedTuple):
    """What an encoder makes of one caption."""

    tokens: Tensor  # int64 (text_seq_len,)
    is_cut: bool  # the caption has more tokens than that


# From a caption and the seed of what is left to chance in encoding it, None for nothing; raises ValueError for one that
# it cannot take. Loader workers may pickle it: a function of a module or an object, not a lambda.
EncodeText = Callable[[str, str | None], EncodedCaption]


class Sample(TypedDict):
    """One captioned picture: its pixels, or the image tokens that stand for them."""

    pixels: NotRequired[Tensor]  # uint8 (3, image_size, image_size) in [0, 255]
    image_tokens: NotRequired[Tensor]  # int64 (gh * gw,)
    text_tokens: NotRequired[Tensor]  # int64 (text_seq_len,)
    caption: str
    key: str
    index: int
    # Of this sample and those that it is given instead of: words that find it again -> why it is bad, or CUT_CAPTION.
    findings: dict[str, str]


class Batch(TypedDict):
    """What a training or validation step is given."""

    # uint8 (b, 3, image_size, image_size): a fourth of the bytes of what `to_unit_interval` makes of it on the device.
    pixels: NotRequired[Tensor]
    image_tokens: NotRequired[Tensor]  # int64 (b, gh * gw); instead of `pixels` where pictures were encoded before
    text_tokens: NotRequired[Tensor]  # int64 (b, text_seq_len); only if captions are encoded
    caption: list[str]  # empty strings if captions are not encoded
    key: list[str]
    index: Tensor  # int64 (b,), numbers of the samples in their index; -1 in a stream
    findings: dict[str, str]  # as in `Sample`, of all samples: so that workers' finds reach the main process


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """The dVAE whose tokens stand for pictures."""

    grid: tuple[int, int]  # rows and columns
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How samples are prepared; what they become is a function of it, the sample's name and the draw."""

    image_size: int  # side of the square pictures, in pixels
    encode_text: EncodeText | None = None  # without it captions are not even read
    vary_text: bool = False  # draw one of several captions, and encode with a seed
    caption: CaptionSource = field(default_factory=CaptionSource)
    augmentation: Augmentation = "none"  # `none` is the centred square, the same in every draw
    seed: int = 0
    background: str = "white"  # what transparent parts of pictures show, a colour that `transforms.parse_color` takes
    small_pictures: SmallPictures = "enlarge"  # those with a side below image_size; `refuse` makes them bad samples
    tokens: TokenSource | None = None  # read image tokens instead of pictures

    def sample(
        self,
        raw: RawSample,
        name: int | str,
        draw: int,
        *,
        index: int,
        findings: dict[str, str],
        pixels: Tensor | None = None,
    ) -> Sample:
        """All of a sample; that its caption is cut is added to `findings`, which it then has.

        Args:
            raw: What is prepared.
            name: Tells it apart from all others, for what is drawn.
            draw: How often it could have come before, see `order.SampleOrder`.
            index: Its number for the batch.
            findings: What was found so far.
            pixels: What `pixels` has given before.

        Raises: BadSampleError as `pixels`, `image_tokens` and `encode`.
        """
        sample = Sample(caption="", key=raw.key, index=index, findings=findings)
        if self.tokens is not None:
            sample["image_tokens"] = self.image_tokens(raw, draw)
        else:
            sample["pixels"] = self.pixels(raw, name, draw) if pixels is None else pixels
        if self.encode_text is not None:
            sample["caption"], (sample["text_tokens"], is_cut) = self.encode(raw, name, draw)
            if is_cut:
                findings[raw.describe()] = CUT_CAPTION
        return sample

    def pixels(self, raw: RawSample, name: int | str, draw: int) -> Tensor:
        """The square picture, uint8 (3, image_size, image_size).

        Raises: BadSampleError if it has none, or none that can be decoded or is large enough.
        """
        return self.crops(raw, name, [draw])[0]

    def crops(self, raw: RawSample, name: int | str, draws: Sequence[int]) -> Tensor:
        """The square picture in several draws, uint8 (draws, 3, image_size, image_size).

        Raises: as `pixels`.
        """
        data = raw.image()
        try:
            too_small = self.small_pictures == "refuse" and min(picture_size(data)) < self.image_size
            if not too_small and self.augmentation == "none":
                square = crop_and_resize(decode_image(data, self.background), self.image_size)
                return square[None].expand(len(draws), -1, -1, -1)
            if not too_small:
                return augment_file_epochs(
                    data,
                    self.augmentation,
                    image_size=self.image_size,
                    seed=self.seed,
                    epochs=draws,
                    key=name,
                    background=self.background,
                )
        except ValueError as error:
            message = f"picture of {raw.describe()} cannot be decoded ({error})"
            raise BadSampleError(message, "picture cannot be decoded") from error
        raise BadSampleError(
            f"picture of {raw.describe()} is too small: its short side must be at least {self.image_size} pixels, got "
            f"{min(picture_size(data))} (data.small_pictures=enlarge takes it)",
            "picture too small",
        )

    def image_tokens(self, raw: RawSample, draw: int) -> Tensor:
        """The tokens of one crop, int64 (gh * gw,); crops are taken in turns.

        Raises: BadSampleError if it has none, or they cannot be this dVAE's.
        """
        assert self.tokens is not None, "only called where there are tokens"
        crops = raw.image_tokens()
        if crops.shape[1:] != self.tokens.grid or int(crops.max()) >= self.tokens.vocab_size:
            raise BadSampleError(
                f"image tokens of {raw.describe()} must have a grid of {self.tokens.grid} and be below "
                f"{self.tokens.vocab_size}, got a grid of {crops.shape[1:]} and up to {crops.max()}",
                "image tokens damaged",
            )
        return torch.from_numpy(crops[draw % len(crops)].astype("int64")).flatten()

    def encode(self, raw: RawSample, name: int | str, draw: int) -> tuple[str, EncodedCaption]:
        """A caption and its tokens.

        Raises: BadSampleError if it has none, or none that the encoder takes.
        """
        assert self.encode_text is not None, "only called where captions are encoded"
        seed = f"{self.seed}|{draw}|{name}" if self.vary_text else None
        caption = draw_caption(self.caption.read(raw), seed)
        try:
            return caption, self.encode_text(caption, seed)
        except ValueError as error:
            message = f"caption of {raw.describe()} cannot be encoded ({error})"
            raise BadSampleError(message, "caption cannot be encoded") from error


def collate(samples: list[Sample]) -> Batch:
    """Samples as one batch."""
    batch = Batch(
        caption=[sample["caption"] for sample in samples],
        key=[sample["key"] for sample in samples],
        index=torch.tensor([sample["index"] for sample in samples]),
        findings={found: kind for sample in samples for found, kind in sample["findings"].items()},
    )
    if "pixels" in samples[0]:
        batch["pixels"] = torch.stack([sample["pixels"] for sample in samples])
    else:
        batch["image_tokens"] = torch.stack([sample["image_tokens"] for sample in samples])
    if "text_tokens" in samples[0]:
        batch["text_tokens"] = torch.stack([sample["text_tokens"] for sample in samples])
    return batch
