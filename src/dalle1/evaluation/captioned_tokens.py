"""Captioned pictures as a transformer takes them: text tokens and image tokens, as validation during training has them.

Pictures are the largest centred part of the model's aspect, resized; of several captions the first counts, and of
several crops in token shards the first.
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

import torch
from jaxtyping import Int
from torch import Tensor

from dalle1.checkpoint import Loaded, check_pair, text_tokenizer_of
from dalle1.data.captions import CaptionSource, draw_caption
from dalle1.data.dataset import BadSamples, OnBadSample
from dalle1.data.folders import TABLE_EXTENSIONS
from dalle1.data.raw_sample import CAPTION, METADATA, BadSampleError, RawSample
from dalle1.data.sample_index import JoinedIndex, SampleIndex
from dalle1.data.sources import Split, open_index
from dalle1.data.token_shards import MANIFEST, open_tokens, read_manifest
from dalle1.data.transforms import decode_image, fit_picture, to_unit_interval
from dalle1.evaluation.picture_sets import PictureSet
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.caption_encoder import CaptionEncoder
from dalle1.tokenizers.image import ImageTokenizer

_MOST_THREADS = 8  # that read and decode


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Some captioned pictures."""

    text_tokens: Int[Tensor, "b t"]
    image_tokens: Int[Tensor, "b gh gw"]


class CaptionedTokens:
    """Captioned pictures in a fixed order; what cannot be used is an error, or is left out and counted."""

    def __init__(
        self,
        samples: SampleIndex | Sequence[RawSample],
        transformer: Loaded[DalleTransformer],
        image_tokenizer: ImageTokenizer | None,
        *,
        pixels_per_token: int,
        caption: str = "text",
        truncate_captions: bool = False,
        on_bad_sample: OnBadSample = "error",
    ) -> None:
        """Read `samples` for `transformer`.

        Args:
            samples: Not read yet.
            transformer: Its grid, and the text tokenizer that travels with it.
            image_tokenizer: Makes tokens of pictures, on the device that it is on; None where samples have tokens.
            pixels_per_token: Along one side of a picture.
            caption: Where captions stand, as `data.captions.CaptionSource` takes it.
            truncate_captions: Cut captions that are too long; else these samples are bad.
            on_bad_sample: `error` raises; `skip` says so and leaves the sample out.

        Raises: ValueError for no sample, or a checkpoint without text tokenizer; as `CaptionSource`.
        """
        config = transformer.model.config
        self.samples = PictureSet(samples)  # refuses an empty one
        self.pixels_per_token = pixels_per_token
        self._grid = (config.grid_height, config.grid_width)
        self._vocab_size = config.image_vocab_size
        self._image_tokenizer = image_tokenizer
        self._caption = CaptionSource(setting=caption)
        self._encode = CaptionEncoder(text_tokenizer_of(transformer, "transformer"), truncate=truncate_captions)
        self._bad_samples = BadSamples(on_bad_sample, option="on_bad_sample")
        self._how = {"caption": caption, "truncate_captions": truncate_captions, "on_bad_sample": on_bad_sample}

    @classmethod
    def open(
        cls,
        paths: Sequence[str],
        transformer: Loaded[DalleTransformer],
        image_tokenizer: ImageTokenizer | None,
        *,
        split: Split = "val",
        **how: Any,
    ) -> CaptionedTokens:
        """What paths name: shards, folders and tables of captioned pictures, or one directory that stage=tokens made.

        Args:
            paths: Or globs of them.
            transformer: See `__init__`.
            image_tokenizer: Its dVAE; only for pictures.
            split: Of a directory of tokens.
            how: See `__init__`.

        Raises: ValueError or OSError if there are none, or tokens of another dVAE or grid.
        """
        config = transformer.model.config
        if len(paths) == 1 and Path(paths[0], MANIFEST).is_file():
            manifest = read_manifest(paths[0])
            if manifest.dvae_sha256 != transformer.dvae_sha256:
                raise ValueError(
                    f"tokens must be those of the transformer's dVAE, {str(transformer.dvae_sha256)[:12]}, got those "
                    f"of {manifest.dvae_sha256[:12]} in '{paths[0]}'; give others, or pictures"
                )
            if manifest.grid != [config.grid_height, config.grid_width]:
                raise ValueError(
                    f"tokens must have the transformer's grid, {config.grid_height} x {config.grid_width}, got "
                    f"{manifest.grid[0]} x {manifest.grid[1]} in '{paths[0]}'; give others, or pictures"
                )
            samples = JoinedIndex(open_tokens(paths[0], manifest, split))
            factor = manifest.image_size // manifest.grid[0]
            return cls(samples, transformer, None, pixels_per_token=factor, **how)
        if image_tokenizer is None:
            raise ValueError(f"pictures need the transformer's dVAE, there is none for {paths[0]!r}; give dvae=PATH")
        check_pair(transformer, image_tokenizer)
        factor = image_tokenizer.dvae.config.downsampling
        index = open_index(paths, skip_damage=how.get("on_bad_sample") == "skip")
        opened = cls(index, transformer, image_tokenizer, pixels_per_token=factor, **how)
        for damage in index.damages:
            opened._bad_samples.pass_over_damage(damage)
        return opened

    def __len__(self) -> int:
        """Number of samples, bad ones included."""
        return len(self.samples)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What they are, in plain types; other samples or captions, or read in another way, have others."""
        return self.samples.facts | {"captions_sha256": self._hash_captions()} | self._how

    def _hash_captions(self) -> str:
        """Of the captions of folders and tables, whose pictures do not change with them; those of shards do."""
        digest = hashlib.sha256()
        for sample in self.samples.samples:
            if Path(sample.container).is_dir() or sample.container.lower().endswith(TABLE_EXTENSIONS):
                for part in (CAPTION, METADATA):
                    digest.update(hashlib.sha256(sample.part(part) or b"").digest())
        return digest.hexdigest()

    def batches(self, numbers: range, *, batch_size: int, device: torch.device) -> Iterator[TokenBatch]:
        """The good ones of the samples with these numbers.

        Raises: BadSampleError for a bad one if those are errors.
        """
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
            # All begin at once: read and decoded while others go through the networks.
            futures = [pool.submit(self._read, i) for i in numbers]
            for first in range(0, len(futures), batch_size):
                good = []
                for future in futures[first : first + batch_size]:
                    try:
                        good.append(future.result())
                    except BadSampleError as error:
                        self._bad_samples.pass_over(error)
                if good:
                    text, images = (torch.stack(column) for column in zip(*good, strict=True))
                    yield TokenBatch(text_tokens=text, image_tokens=self._tokens(images, device))

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        """Text tokens, and the pixels of the picture or its tokens."""
        sample = self.samples.samples[number]
        caption = draw_caption(self._caption.read(sample), None)
        try:
            text_tokens, _ = self._encode(caption, None)
        except ValueError as error:
            message = f"caption of {sample.describe()} cannot be encoded ({error})"
            raise BadSampleError(message, "caption cannot be encoded") from error
        return text_tokens, self._read_tokens(sample) if self._image_tokenizer is None else self._read_pixels(sample)

    def _read_pixels(self, sample: RawSample) -> Tensor:
        height, width = (side * self.pixels_per_token for side in self._grid)
        try:
            return fit_picture(decode_image(sample.image()), height, width)
        except ValueError as error:
            if isinstance(error, BadSampleError):
                raise
            message = f"picture of {sample.describe()} cannot be decoded ({error})"
            raise BadSampleError(message, "picture cannot be decoded") from error

    def _read_tokens(self, sample: RawSample) -> Tensor:
        crops = sample.image_tokens()
        if crops.shape[1:] != self._grid or int(crops.max()) >= self._vocab_size:
            raise BadSampleError(
                f"image tokens of {sample.describe()} must have a grid of {self._grid} and be below "
                f"{self._vocab_size}, got a grid of {crops.shape[1:]} and up to {crops.max()}",
                "image tokens damaged",
            )
        return torch.from_numpy(crops[0].astype("int64"))

    def _tokens(self, images: Tensor, device: torch.device) -> Int[Tensor, "b gh gw"]:
        if self._image_tokenizer is None:
            return images
        return self._image_tokenizer.encode(to_unit_interval(images.to(device)))
