"""Captioned pictures for Lightning: from what the configuration names to loaders."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
import torch

from dalle1.data.captions import CaptionSource
from dalle1.data.config import DataConfig
from dalle1.data.dataset import PairDataset
from dalle1.data.filter_scan import Filtered, filter_index
from dalle1.data.findings import Findings, join_findings
from dalle1.data.loader import ResumableLoader, ValidationLoader, validation_loader
from dalle1.data.order import SampleOrder
from dalle1.data.preparation import EncodeText, Preparation, TokenSource
from dalle1.data.remote import expand_addresses
from dalle1.data.sample_index import JoinedIndex, SampleIndex
from dalle1.data.sources import Split, open_index
from dalle1.data.stream import StreamLoader, StreamSettings, ValidationStreamLoader, read_captions
from dalle1.data.token_shards import TokenManifest, open_tokens, read_manifest


class PairDataModule(pl.LightningDataModule):
    """Training and validation batches (see `preparation.Batch`) of what a `DataConfig` names.

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
        self._train_loader: ResumableLoader | StreamLoader | None = None
        self._parts: dict[Split, list[tuple[Filtered, float]]] = {}
        self._datasets: dict[Split, PairDataset] = {}  # by split, once used
        self._findings: dict[Split, Findings] = {}
        self._dropped: dict[Split, Counter[str]] = {}

    @cached_property
    def tokens(self) -> TokenManifest | None:
        """What the image tokens are that stand for pictures, if there are any."""
        return None if self.config.tokens is None else read_manifest(self.config.tokens)

    def check_dvae(self, sha256: str) -> None:
        """Refuse image tokens of another dVAE or of pictures of another size. Raises: ValueError."""
        if self.tokens is None:
            return
        if self.tokens.dvae_sha256 != sha256:
            raise ValueError(
                f"data.tokens must be those of this dVAE, {sha256[:12]}, got those of {self.tokens.dvae_sha256[:12]} "
                f"in '{self.config.tokens}'; give that dVAE as dvae=, or run stage=tokens again under another name="
            )
        if self.tokens.image_size != self.config.image_size:
            raise ValueError(
                f"data.tokens must be of pictures of {self.config.image_size} pixels, got {self.tokens.image_size}; "
                f"set image_size={self.tokens.image_size} and its grid_size={self.tokens.grid[0]}"
            )

    def parts(self, split: Split) -> list[tuple[SampleIndex, float]]:
        """The samples of each source of a split that filters keep, and how often each comes in an epoch.

        Raises: as `sources.open_index` and `filter_scan.filter_index`.
        """
        return [(part.index, weight) for part, weight in self._filtered_parts(split)]

    def _filtered_parts(self, split: Split) -> list[tuple[Filtered, float]]:
        if split not in self._parts:
            self._parts[split] = self._open(split)
        return self._parts[split]

    def _open(self, split: Split) -> list[tuple[Filtered, float]]:
        if self.tokens is not None:
            assert self.config.tokens is not None, "there are tokens"
            indexes = open_tokens(self.config.tokens, self.tokens, split)
            return [
                (Filtered(index=each), weight) for each, weight in zip(indexes, self.tokens.weights[split], strict=True)
            ]
        skip_damage = self.config.on_bad_sample == "skip"
        caption = CaptionSource(setting=self.config.caption)
        opened = []
        for source in self.config.sources(split):
            index = open_index(source.paths, skip_damage=skip_damage)
            opened.append((filter_index(index, self.config.filters, caption), source.weight))
        return opened

    def index(self, split: Split) -> SampleIndex:
        """All samples of a split that filters keep, those of all sources in one row."""
        indexes = [index for index, _ in self.parts(split)]
        return indexes[0] if len(indexes) == 1 else JoinedIndex(indexes)

    def prepare_data(self) -> None:
        """Make the shards if there is a recipe and they are missing.

        Raises: FileExistsError or FileNotFoundError as `ShapesRecipe.ensure` does.
        """
        if self.config.recipe is not None and self.config.tokens is None:
            self.config.recipe.ensure()

    def setup(self, stage: str | None = None) -> None:
        """Scan the shards that `stage` needs, so that a wrong path or a damaged tar is found before the first step.

        Raises: what `parts` raises; for a stream what `remote.expand_addresses` raises.
        """
        splits: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            None: ("train", "val"),
            "validate": ("val",),
        }
        for split in splits.get(stage, ()):
            if self.config.is_stream(split):
                self._stream_settings(split)
            else:
                self.parts(split)

    def preparation(self, split: Split, *, encode_text: bool = True) -> Preparation:
        """How the samples of a split are prepared."""
        config, tokens = self.config, self.tokens
        return Preparation(
            image_size=config.image_size,
            encode_text=self.encode_text if encode_text else None,
            vary_text=split == "train",
            caption=CaptionSource(setting=config.caption),
            augmentation=config.augmentation if split == "train" else "none",
            seed=config.seed,
            background=config.background,
            small_pictures=config.small_pictures,
            tokens=None
            if tokens is None
            else TokenSource(grid=(tokens.grid[0], tokens.grid[1]), vocab_size=tokens.vocab_size),
        )

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Shuffled training batches for this device.

        Raises: ValueError if the samples do not fill one batch on every device.
        """
        devices = self._device_options()
        if self.config.is_stream("train"):
            self._train_loader = self._train_stream(devices)
            return self._train_loader
        parts = self.parts("train")
        weights = [weight for index, weight in parts for _ in index.block_sizes]
        sizes = [size for index, _ in parts for size in index.block_sizes.tolist()]
        self._check_agreement([sizes, weights])
        order = SampleOrder(sizes, seed=self.config.seed, window=self.config.shuffle_window, block_weights=weights)
        dataset = self._dataset("train")
        self._train_loader = ResumableLoader(dataset, order, batch_size=self.config.batch_size, **devices)
        return self._train_loader

    def val_dataloader(self) -> ValidationLoader | ValidationStreamLoader:
        """This device's share of all validation samples, in order."""
        devices = self._device_options()
        if self.config.is_stream("val"):
            loader = ValidationStreamLoader(self._stream_settings("val"), **devices)
            self._findings["val"], self._dropped["val"] = loader.findings, loader.dropped
            return loader
        return validation_loader(self._dataset("val"), batch_size=self.config.batch_size, **devices)

    def _train_stream(self, devices: dict[str, Any]) -> StreamLoader:
        shards, weights = self._addresses("train")
        self._check_agreement([shards, weights])
        loader = StreamLoader(
            self._stream_settings("train"),
            SampleOrder([1] * len(shards), seed=self.config.seed, block_weights=weights),
            seed=self.config.seed,
            **devices,
        )
        self._findings["train"], self._dropped["train"] = loader.findings, loader.dropped
        return loader

    def _addresses(self, split: Split) -> tuple[list[str], list[float]]:
        shards: list[str] = []
        weights: list[float] = []
        for source in self.config.sources(split):
            found = expand_addresses(
                source.paths, allow_pipe=self.config.allow_pipe, missing_ok=self.config.on_bad_sample == "skip"
            )
            shards += found
            weights += [source.weight] * len(found)
        return shards, weights

    def _stream_settings(self, split: Split) -> StreamSettings:
        return StreamSettings(
            shards=tuple(self._addresses(split)[0]),
            preparation=self.preparation(split),
            filters=self.config.filters,
            on_bad_sample=self.config.on_bad_sample,
            max_bad_fraction=self.config.max_bad_fraction,
            batch_size=self.config.batch_size,
            buffer=self.config.stream_buffer,
        )

    def teardown(self, stage: str) -> None:
        """Stop the training loader's workers, as Lightning itself does for loaders of its own kind."""
        if self._train_loader is not None:
            self._train_loader.close()

    def train_captions(self) -> Iterator[str]:
        """The captions of the training set in the order of its shards, for training a tokenizer.

        Raises: BadSampleError for a missing, empty or undecodable caption if bad samples are errors; ValueError if too
            many are bad.
        """
        if self.config.is_stream("train"):
            self._findings["train"] = Findings(max_bad_fraction=self.config.max_bad_fraction)
            captions = read_captions(self._stream_settings("train"), self._findings["train"])
        else:
            captions = self._dataset("train").captions()
        return self._judged(captions)

    def _judged(self, captions: Iterator[str]) -> Iterator[str]:
        yield from captions
        self._findings["train"].judge()

    def count_findings(self) -> Counter[str]:
        """How many samples and shards were passed over, by what is wrong with them, or had their caption cut.

        Each counts once. Those that any device met; after a resumed start, of the time before it only those that the
        first device met. All devices must call this together.
        """
        mine: list[Any] = list(self._findings.values())
        _, world_size = self._rank_and_world_size()
        of_ranks: list[Any] = [mine]
        if world_size > 1:
            of_ranks = [None] * world_size
            torch.distributed.all_gather_object(of_ranks, mine)
        return join_findings(part for of_rank in of_ranks for part in of_rank)

    def count_dropped(self) -> Counter[str]:
        """How many samples filters have left out, by reason: of all, or in a stream of those this device has read."""
        dropped: Counter[str] = sum(self._dropped.values(), Counter())
        for parts in self._parts.values():
            for part, _ in parts:
                dropped += part.dropped
        return dropped

    def n_samples_used(self) -> int | None:
        """Number of samples in the splits that were read, bad ones included; None if one is a stream."""
        if any(split not in self._datasets for split in self._findings):
            return None
        return sum(len(dataset) for dataset in self._datasets.values())

    def _dataset(self, split: Split) -> PairDataset:
        if split not in self._datasets:
            self._datasets[split] = PairDataset(
                self.index(split),
                self.preparation(split),
                on_bad_sample=self.config.on_bad_sample,
                max_bad_fraction=self.config.max_bad_fraction,
                cache_images=self.config.cache_images,
            )
            self._findings[split] = self._datasets[split].findings
        return self._datasets[split]

    def _check_agreement(self, facts: list[Any]) -> None:
        """Raise ValueError, on every device, unless all of them see the same data."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        mine = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, mine)
        if different := [rank for rank, theirs in enumerate(of_ranks) if theirs != of_ranks[0]]:
            raise ValueError(
                f"all devices must see the same data, got other shards or samples on device {different[0]} than on the "
                "first one; look for files that are missing or damaged on one machine"
            )

    def _device_options(self) -> dict[str, Any]:
        """Arguments of every loader."""
        rank, world_size = self._rank_and_world_size()
        return {
            "rank": rank,
            "world_size": world_size,
            "num_workers": self.config.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
