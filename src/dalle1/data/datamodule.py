"""Captioned pictures for Lightning: from shard patterns to loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dalle1.data.dataset import OnBadSample, PairDataset, Sample
from dalle1.data.fields import require_int
from dalle1.data.loader import ResumableLoader, validation_loader
from dalle1.data.shapes_shards import ShapesRecipe
from dalle1.data.shards import ShardIndex


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned pictures to train on, and how they are read."""

    train: str | list[str]  # path or glob of the training shards, or a list of them
    val: str | list[str]  # the same for validation
    image_size: int  # side of the square pictures that models see, in pixels, >= 1
    batch_size: int  # samples per device, >= 1
    num_workers: int = 2  # processes per device that decode pictures; 0 decodes in the training process
    seed: int = 0  # decides the order of the samples, >= 0
    on_bad_sample: OnBadSample = "error"  # `skip` takes the next sample instead, and logs it
    cache_images: bool = False  # keep decoded pictures in memory (per worker): for small sets with num_workers=0
    recipe: ShapesRecipe | None = None  # makes the shards if they are missing

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type (TypeError) or outside their range (ValueError)."""
        for name, minimum in (("image_size", 1), ("batch_size", 1), ("num_workers", 0), ("seed", 0)):
            require_int(name, getattr(self, name), at_least=minimum)
        if self.on_bad_sample not in get_args(OnBadSample):
            raise ValueError(f"on_bad_sample must be 'error' or 'skip', got {self.on_bad_sample!r}")
        if not isinstance(self.cache_images, bool):
            raise TypeError(f"cache_images must be true or false, got {self.cache_images!r}")
        if self.recipe is not None and not isinstance(self.recipe, ShapesRecipe):
            raise TypeError(f"recipe must be a ShapesRecipe or null, got {self.recipe!r}")


class PairDataModule(pl.LightningDataModule):
    """Training and validation batches (see `dataset.Batch`) of the shards that a `DataConfig` names.

    The training loader brings its own order for every device and can be resumed: give the trainer
    `use_distributed_sampler=False`.
    """

    def __init__(self, config: DataConfig, encode_text: Callable[[list[str]], Tensor] | None = None) -> None:
        """Read nothing yet.

        Args:
            config: What to read.
            encode_text: n captions to int64 (n, text_seq_len); without it batches have no `text_tokens`.
        """
        super().__init__()
        self.config = config
        self.encode_text = encode_text
        self._train_loader: ResumableLoader | None = None

    @cached_property
    def train_index(self) -> ShardIndex:
        """The training samples."""
        return ShardIndex(self.config.train)

    @cached_property
    def val_index(self) -> ShardIndex:
        """The validation samples."""
        return ShardIndex(self.config.val)

    def prepare_data(self) -> None:
        """Make the shards if there is a recipe and they are missing.

        Raises: FileExistsError or FileNotFoundError as `ShapesRecipe.ensure` does.
        """
        if self.config.recipe is not None:
            self.config.recipe.ensure()

    def setup(self, stage: str | None = None) -> None:
        """Scan the shards that `stage` needs, so that a wrong path or a damaged tar is found before the first step.

        Raises: what `ShardIndex` raises.
        """
        if stage in ("fit", None):
            _ = self.train_index
        if stage in ("fit", "validate", None):
            _ = self.val_index

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training batches for this device.

        Raises: ValueError if the samples do not fill one batch on every device.
        """
        rank, world_size = self._rank_and_world_size()
        self._train_loader = ResumableLoader(
            self._dataset(self.train_index),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rank=rank,
            world_size=world_size,
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return self._train_loader

    def val_dataloader(self) -> DataLoader[Sample]:
        """This device's share of all validation samples, in order."""
        rank, world_size = self._rank_and_world_size()
        return validation_loader(
            self._dataset(self.val_index),
            batch_size=self.config.batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def teardown(self, stage: str) -> None:
        """Stop the training loader's workers, as Lightning itself does for loaders of its own kind."""
        if self._train_loader is not None:
            self._train_loader.close()

    def train_captions(self) -> Iterator[str]:
        """The captions of the training set in the order of its shards, for training a tokenizer.

        Raises: BadSampleError for a missing, empty or undecodable caption if bad samples are errors.
        """
        return self._dataset(self.train_index).captions()

    def _dataset(self, index: ShardIndex) -> PairDataset:
        return PairDataset(
            index,
            image_size=self.config.image_size,
            encode_text=self.encode_text,
            on_bad_sample=self.config.on_bad_sample,
            cache_images=self.config.cache_images,
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
