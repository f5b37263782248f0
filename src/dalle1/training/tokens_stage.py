"""`train.py stage=tokens`: every picture through the dVAE once, so that training need not do it at every step.

Each device encodes every n-th shard by itself; nothing is exchanged. A shard appears when it is complete, so a run that
was stopped goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dalle1.data.datamodule import PairDataModule
from dalle1.data.dataset import BadSamples
from dalle1.data.fields import require_int
from dalle1.data.findings import Findings
from dalle1.data.loader import loader_options
from dalle1.data.preparation import Preparation
from dalle1.data.raw_sample import CAPTION, METADATA, BadSampleError
from dalle1.data.sample_index import SampleIndex
from dalle1.data.sources import Split
from dalle1.data.token_shards import (
    SPLITS,
    EncodedSample,
    TokenManifest,
    open_tokens,
    shard_path,
    write_manifest,
    write_token_shard,
)
from dalle1.data.transforms import to_unit_interval
from dalle1.tokenizers.image import ImageTokenizer

logger = logging.getLogger(__name__)

_POLL_SECONDS, _TELL_SECONDS = 1.0, 60.0  # while the first device waits for the others


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How pictures are encoded once and for all."""

    crops: int = 1  # of each training picture, >= 1: the draws of its first so many epochs
    batch_size: int = 16  # crops that go through the dVAE together, on each device, >= 1

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type (TypeError) or outside their range (ValueError)."""
        require_int("stage.crops", self.crops, at_least=1)
        require_int("stage.batch_size", self.batch_size, at_least=1)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A part of a split that becomes one shard."""

    path: Path
    split: Split
    numbers: range


def encode_data(
    data: PairDataModule, image_tokenizer: ImageTokenizer, config: TokensConfig, directory: Path, fabric: Fabric
) -> dict[str, Any]:
    """Write all token shards of `data` into `directory` and return what there is to tell of it.

    Raises: ValueError if the directory holds other tokens, if `crops` make no difference, or for bad data.
    """
    manifest = _manifest(data, image_tokenizer, config)
    fabric.launch()
    if fabric.is_global_zero:
        write_manifest(directory, manifest)
    fabric.barrier()
    write_manifest(directory, manifest)  # each device compares: none may write what the others do not agree on
    blocks = _blocks(data, directory)
    mine = [block for block in blocks[fabric.global_rank :: fabric.world_size] if not block.path.exists()]
    encoder = _Encoder(data, image_tokenizer, config, fabric.device)
    with tqdm(
        total=sum(len(block.numbers) for block in mine),
        desc="encoding" if fabric.world_size == 1 else f"encoding, 1 of {fabric.world_size} devices",
        unit=" pictures",
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        disable=not (mine and fabric.is_global_zero),
        dynamic_ncols=True,
    ) as bar:
        started = time.monotonic()
        encoder.write(mine, bar)
        rate = fabric.world_size * encoder.n_encoded / (time.monotonic() - started)
    if not fabric.is_global_zero:
        return {}
    _wait_for(blocks)
    # Of all starts and devices.
    n_encoded = {split: sum(map(len, open_tokens(directory, manifest, split))) for split in SPLITS}
    n_damaged = len({damage.message for split in SPLITS for damage in data.index(split).damages})
    n_bad = sum(len(data.index(split)) - n_encoded[split] for split in SPLITS)
    n_samples = sum(len(data.index(split)) for split in SPLITS)
    if n_bad > data.config.max_bad_fraction * n_samples:
        raise ValueError(
            f"at most {data.config.max_bad_fraction:g} of the samples may be bad (data.max_bad_fraction), got "
            f"{n_bad:,} of {n_samples:,}; mend the data, delete '{directory}' and start again, or raise that share"
        )
    if n_bad or n_damaged:
        reasons = ", ".join(f"{kind} ({count:,})" for kind, count in encoder.findings.count().most_common())
        logger.warning(
            "left out: %s samples, and what is missing in %s damaged shards; on this device and start: %s",
            *(f"{n_bad:,}", f"{n_damaged:,}", reasons or "nothing"),
        )
    return {
        "pictures": n_encoded,
        "bad_samples": n_bad,
        "damaged_shards": n_damaged,
        "tokens": manifest.grid[0] * manifest.grid[1] * (n_encoded["train"] * config.crops + n_encoded["val"]),
        # Of this start, if it had something to do; each crop is a picture to the dVAE.
        "pictures_per_second": round(rate, 1) if mine else None,
    }


def _manifest(data: PairDataModule, image_tokenizer: ImageTokenizer, config: TokensConfig) -> TokenManifest:
    options = data.config
    if config.crops > 1 and options.augmentation == "none":
        raise ValueError(
            f"stage.crops must be 1 without augmentation, which makes all crops the same, got {config.crops}; set "
            "data.augmentation=transformer"
        )
    if image_tokenizer.vocab_size > 1 << 16:
        raise ValueError(f"tokens are kept in 16 bits, for at most 65,536 codes, got {image_tokenizer.vocab_size:,}")
    side = image_tokenizer.grid_size(options.image_size)
    parts = {split: data.parts(split) for split in SPLITS}
    return TokenManifest(
        dvae_sha256=image_tokenizer.sha256,
        vocab_size=image_tokenizer.vocab_size,
        grid=[side, side],
        image_size=options.image_size,
        crops=config.crops,
        augmentation=options.augmentation,
        background=options.background,
        small_pictures=options.small_pictures,
        seed=options.seed,
        caption=options.caption,
        filters=options.filters.to_dict(),
        samples_sha256={split: _hash_samples(data.index(split)) for split in SPLITS},
        n_shards={split: [len(index.block_sizes) for index, _ in parts[split]] for split in SPLITS},
        weights={split: [weight for _, weight in parts[split]] for split in SPLITS},
    )


def _hash_samples(index: SampleIndex) -> str:
    """Changes if blocks have other samples, as far as their numbers and keys tell."""
    found = hashlib.sha256(json.dumps(index.block_sizes.tolist()).encode())
    for sample in index:
        found.update(sample.key.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _blocks(data: PairDataModule, directory: Path) -> list[_Block]:
    blocks = []
    for split in SPLITS:
        ends = np.cumsum(data.index(split).block_sizes).tolist()
        for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            path = shard_path(directory, split, number)
            blocks.append(_Block(path=path, split=split, numbers=range(start, stop)))
    return blocks


def _wait_for(blocks: Sequence[_Block]) -> None:
    """Until the shards of all devices are there; who starts a device sees to it that it does not die unnoticed."""
    told = time.monotonic()
    while missing := [block for block in blocks if not block.path.exists()]:
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            logger.info("waiting for %d shards of other devices, one is '%s'", len(missing), missing[0].path)


class _Cropped(NamedTuple):
    """All of a sample but its tokens."""

    number: int
    key: str
    crops: Tensor  # uint8 (crops, 3, s, s)
    text: bytes | None
    metadata: bytes | None


class _Crops(Dataset[_Cropped | BadSampleError]):
    """The samples of one split, or what is wrong with them."""

    def __init__(self, index: SampleIndex, preparation: Preparation, crops: int) -> None:
        self._index = index
        self._preparation = preparation
        self._crops = crops

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> _Cropped | BadSampleError:
        number = int(number)
        raw = self._index[number]
        try:
            crops = self._preparation.crops(raw, number, range(self._crops))
            return _Cropped(number, raw.key, crops, raw.part(CAPTION), raw.part(METADATA))
        except BadSampleError as error:
            return error


class _Encoder:
    """Encodes blocks one after the other on one device."""

    def __init__(
        self, data: PairDataModule, image_tokenizer: ImageTokenizer, config: TokensConfig, device: torch.device
    ) -> None:
        self._data = data
        self._image_tokenizer = image_tokenizer
        self._config = config
        self._device = device
        self._bad_samples = BadSamples(data.config.on_bad_sample)
        self.findings = Findings(max_bad_fraction=data.config.max_bad_fraction)
        self.n_encoded = 0  # crops

    def write(self, blocks: Sequence[_Block], bar: tqdm[Any]) -> None:
        """Write the shards of `blocks`, those of a split one after the other."""
        for split, of_split in groupby(blocks, key=lambda block: block.split):
            wanted = list(of_split)
            index = self._data.index(split)
            for damage in index.damages:
                self._bad_samples.pass_over_damage(damage)
                self.findings.add({damage.message: damage.kind})
            crops = self._config.crops if split == "train" else 1
            loader = DataLoader(
                _Crops(index, self._data.preparation(split, encode_text=False), crops),
                batch_size=max(1, self._config.batch_size // crops),
                sampler=np.concatenate([np.arange(block.numbers.start, block.numbers.stop) for block in wanted]),
                collate_fn=list,
                **loader_options(self._data.config.num_workers, pin_memory=self._device.type == "cuda"),
            )
            encoded = self._encode(loader, bar)
            for block in wanted:
                part = (next(encoded) for _ in block.numbers)
                write_token_shard(block.path, (sample for sample in part if sample is not None))

    def _encode(self, batches: DataLoader[_Cropped | BadSampleError], bar: tqdm[Any]) -> Iterator[EncodedSample | None]:
        """Samples with their tokens, or None for a bad one, in the loader's order."""
        for batch in batches:
            bad = [sample for sample in batch if isinstance(sample, BadSampleError)]
            for error in bad:
                self._bad_samples.pass_over(error)
            self.findings.add({str(error): error.kind for error in bad}, n_wanted=len(batch))
            good = [sample for sample in batch if isinstance(sample, _Cropped)]
            tokens = iter(self._tokens(torch.stack([sample.crops for sample in good])) if good else [])
            self.n_encoded += sum(len(sample.crops) for sample in good)
            bar.update(len(batch))
            for sample in batch:
                if isinstance(sample, _Cropped):
                    yield EncodedSample(sample.key, next(tokens), sample.text, sample.metadata)
                else:
                    yield None

    def _tokens(self, pixels: Tensor) -> np.ndarray:
        n_pictures, n_crops = pixels.shape[:2]
        image = to_unit_interval(pixels.flatten(0, 1).to(self._device, non_blocking=True))
        # More crops of a picture than fit at once go through one after the other.
        parts = [self._image_tokenizer.encode(part) for part in torch.split(image, self._config.batch_size)]
        tokens = torch.unflatten(torch.cat(parts), 0, (n_pictures, n_crops))
        return tokens.cpu().numpy().astype(np.uint16)


def build_fabric(arguments: dict[str, Any]) -> Fabric:
    """Devices as the trainer's options name them; they exchange nothing, so each strategy is one process a device."""
    names = ("accelerator", "devices", "num_nodes")
    strategy = "ddp" if "strategy" in arguments else "auto"
    return Fabric(strategy=strategy, **{name: arguments[name] for name in names if name in arguments})
