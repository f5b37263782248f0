"""Batches for training, resumable at any batch, and batches for validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dalle1.data.dataset import Batch, PairDataset, Sample, collate
from dalle1.data.order import batch_indices, batches_per_epoch


class ResumableLoader:
    """Training batches in an order that depends on the seed alone and continues exactly where it stopped.

    All of its state is the number of batches handed out since the start of training, and the findings made in
    them. Both are counted here, in the main process, so batches that workers have prepared but nobody has seen are
    simply prepared again. The number is the same on all ranks; the findings are this rank's. One pass over the
    loader ends at the end of the epoch; the next pass continues from there. Do not iterate over it twice at the
    same time.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Batches of `dataset` for device `rank` of `world_size`.

        Args:
            dataset: The samples.
            batch_size: Samples per device and batch.
            seed: Decides the order, >= 0; augmentation and varied captions have the seed of `dataset`.
            rank: Number of this device, from 0.
            world_size: Number of devices.
            num_workers: Processes that decode; 0 decodes in this one.
            pin_memory: Deliver in page-locked memory, for faster copies to a GPU.

        Raises:
            ValueError: If the data set is smaller than one global batch.
        """
        self._sampler = _RestOfEpoch(
            seed=seed, n_samples=len(dataset), batch_size=batch_size, rank=rank, world_size=world_size
        )
        self.dataset = dataset
        self._options = _options(num_workers, pin_memory)
        self._loader = self._idle_loader()

    def close(self) -> None:
        """Stop the workers; another pass over the loader would start new ones.

        Left to the garbage collector, each may take five seconds to stop.
        """
        self._loader = self._idle_loader()

    def _idle_loader(self) -> DataLoader[Sample]:
        return DataLoader(_SamplesByEpoch(self.dataset), batch_sampler=self._sampler, **self._options)

    def __len__(self) -> int:
        """Batches per epoch, wherever in it the loader stands."""
        return self._sampler.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """The batches from here to the end of the epoch."""
        for batch in _recorded(self._loader, self.dataset):
            # Before the yield: a checkpoint saved while this batch is in use must not repeat it.
            self._sampler.n_batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The number of batches handed out and the settings that it holds for; the data set's findings."""
        findings = dict(self.dataset.findings)
        return {"n_batches": self._sampler.n_batches, **self._sampler.order, "findings": findings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that `state` counts.

        Raises: ValueError if it was saved with another seed, data set size, batch size or number of devices.
        """
        changes = [
            f"{name} {state[name]}, not {now}" for name, now in self._sampler.order.items() if state[name] != now
        ]
        if changes:
            raise ValueError(
                f"the data order can only be resumed with the settings it was saved with: {'; '.join(changes)}; "
                "restore them, or start a new run from the saved weights"
            )
        self._sampler.n_batches = state["n_batches"]
        self.dataset.findings.update(state["findings"])


class _SamplesByEpoch(Dataset[Sample]):
    """The data set as a sampler asks for it that knows the epoch."""

    def __init__(self, dataset: PairDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, epoch_and_i: tuple[int, int]) -> Sample:
        epoch, i = epoch_and_i
        return self._dataset.sample(i, epoch)


def _recorded(batches: Iterable[Batch], dataset: PairDataset) -> Iterator[Batch]:
    """The batches; what workers found in making them is noted in this process's data set."""
    for batch in batches:
        dataset.findings.update(batch["findings"])
        yield batch


class _RestOfEpoch:
    """A batch sampler: each pass yields (epoch, sample id) from batch number `n_batches` to the end of its epoch."""

    def __init__(self, *, seed: int, n_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.n_batches = 0
        self.batches_per_epoch = batches_per_epoch(n_samples, batch_size=batch_size, world_size=world_size)
        # What has to stay the same for `n_batches` to mean the same samples, on all ranks.
        self.order = {"seed": seed, "n_samples": n_samples, "batch_size": batch_size, "world_size": world_size}
        self._rank = rank

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.n_batches // self.batches_per_epoch
        for step in range(self.n_batches, (epoch + 1) * self.batches_per_epoch):
            ids = batch_indices(step=step, rank=self._rank, **self.order).tolist()
            yield [(epoch, i) for i in ids]


class ValidationLoader(DataLoader[Sample]):
    """Batches of a `PairDataset`, whose findings are kept complete."""

    dataset: PairDataset

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """All batches."""
        return _recorded(super().__iter__(), self.dataset)


def validation_loader(
    dataset: PairDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> ValidationLoader:
    """Batches with every sample once and in order; the last one may be smaller, none is dropped.

    Sample i goes to device i % `world_size`, so ranks may differ by one sample and thus by one batch.

    Raises: ValueError if there is not a sample for every device.
    """
    if len(dataset) < world_size:
        raise ValueError(
            f"validation needs at least as many samples as devices ({world_size}), got {len(dataset)}; add to data.val"
        )
    mine = range(rank, len(dataset), world_size)
    return ValidationLoader(dataset, sampler=mine, batch_size=batch_size, **_options(num_workers, pin_memory))


def _options(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "collate_fn": collate,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": pin_memory,
        # Every pass draws a seed for its workers. Drawn from the global generator, as is the default, it would
        # change the noise of a run that is resumed.
        "generator": torch.Generator(),
    }
