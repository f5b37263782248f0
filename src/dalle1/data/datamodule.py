"""Captioned pictures for Lightning: from shard patterns to loaders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch

from dalle1.data.augmentation import Augmentation
from dalle1.data.dataset import EncodeText, OnBadSample, PairDataset, SmallPictures
from dalle1.data.fields import require_int
from dalle1.data.loader import ResumableLoader, ValidationLoader, validation_loader
from dalle1.data.shapes_shards import ShapesRecipe
from dalle1.data.shards import ShardIndex, shard_patterns
from dalle1.data.transforms import parse_color


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which captioned pictures to train on, and how they are read."""

    train: str | list[str]  # path or glob of the training shards, or a list of them
    val: str | list[str]  # the same for validation
    image_size: int  # side of the square pictures that models see, in pixels, >= 1
    batch_size: int  # samples per device, >= 1
    num_workers: int = 2  # processes per device that decode pictures; 0 decodes in the training process
    seed: int = 0  # decides the order of the samples, their augmentation and their captions' dropout, >= 0
    on_bad_sample: OnBadSample = "error"  # `skip` takes the next sample instead, and logs it
    # Keep decoded pictures in memory (per worker), whole ones with augmentation: for small sets with num_workers=0.
    cache_images: bool = False
    recipe: ShapesRecipe | None = None  # makes the shards if they are missing
    # How training pictures become square: the centre, or as the paper does for that stage. Validation has the centre.
    augmentation: Augmentation = "none"
    background: str = "white"  # what transparent parts of pictures show: a colour's name or '#rrggbb'
    small_pictures: SmallPictures = "enlarge"  # those with a side below image_size; `refuse` makes them bad samples

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type (TypeError) or outside their range (ValueError)."""
        for name, minimum in (("image_size", 1), ("batch_size", 1), ("num_workers", 0), ("seed", 0)):
            require_int(name, getattr(self, name), at_least=minimum)
        choices = {"on_bad_sample": OnBadSample, "augmentation": Augmentation, "small_pictures": SmallPictures}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                *first, last = map(repr, get_args(allowed))
                raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {getattr(self, name)!r}")
        try:
            parse_color(self.background)
        except ValueError as error:
            raise ValueError(f"background: {error}") from error
        if not isinstance(self.cache_images, bool):
            raise TypeError(f"cache_images must be true or false, got {self.cache_images!r}")
        if self.recipe is not None and not isinstance(self.recipe, ShapesRecipe):
            raise TypeError(f"recipe must be a ShapesRecipe or null, got {self.recipe!r}")

    @property
    def train_patterns(self) -> list[str]:
        """Paths and globs of the training shards.

        Raises: TypeError if `train` is neither a string nor a list of strings.
        """
        return shard_patterns(self.train)


class PairDataModule(pl.LightningDataModule):
    """Training and validation batches (see `dataset.Batch`) of the shards that a `DataConfig` names.

    The training loader brings its own order for every device and can be resumed: give the trainer
    `use_distributed_sampler=False`.
    """

    def __init__(self, config: DataConfig, encode_text: EncodeText | None = None) -> None:
        """Read nothing yet.

        Args:
            config: What to read.
            encode_text: Encodes captions, with a seed in training; without it batches have no `text_tokens`.
        """
        super().__init__()
        self.config = config
        self.encode_text = encode_text
        self._train_loader: ResumableLoader | None = None
        self._datasets: dict[str, PairDataset] = {}  # by split, once used

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
            self._dataset("train"),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            rank=rank,
            world_size=world_size,
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return self._train_loader

    def val_dataloader(self) -> ValidationLoader:
        """This device's share of all validation samples, in order."""
        rank, world_size = self._rank_and_world_size()
        return validation_loader(
            self._dataset("val"),
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
        return self._dataset("train").captions()

    def count_findings(self) -> Counter[str]:
        """How many samples were skipped, by what is wrong with them, or had their caption cut; each counts once.

        Those that any device met; after a resumed start, of the time before it only those that the first device met.
        All devices must call this together.
        """
        met = {
            dataset.index.describe(i): kind
            for dataset in self._datasets.values()
            for i, kind in dataset.findings.items()
        }
        _, world_size = self._rank_and_world_size()
        if world_size > 1:
            of_ranks: list[Any] = [None] * world_size
            torch.distributed.all_gather_object(of_ranks, met)
            met = {sample: kind for of_rank in of_ranks for sample, kind in of_rank.items()}
        return Counter(met.values())

    @property
    def n_samples_used(self) -> int:
        """Number of samples in the splits that were read, bad ones included."""
        return sum(len(dataset) for dataset in self._datasets.values())

    def _dataset(self, split: Literal["train", "val"]) -> PairDataset:
        if split not in self._datasets:
            self._datasets[split] = PairDataset(
                self.train_index if split == "train" else self.val_index,
                image_size=self.config.image_size,
                encode_text=self.encode_text,
                vary_text=split == "train",
                on_bad_sample=self.config.on_bad_sample,
                cache_images=self.config.cache_images,
                augmentation=self.config.augmentation if split == "train" else "none",
                seed=self.config.seed,
                background=self.config.background,
                small_pictures=self.config.small_pictures,
            )
        return self._datasets[split]

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
