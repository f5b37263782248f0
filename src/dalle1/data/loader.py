"""Batches for training, resumable at any batch, and batches for validation."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dalle1.data.dataset import PairDataset
from dalle1.data.findings import Findings
from dalle1.data.order import SampleOrder, batches_per_epoch
from dalle1.data.preparation import Batch, Sample, collate

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 60  # that a worker lives on after SIGTERM; schedulers wait 30 to 90 before they kill


class ResumableLoader:
    """Training batches in the order of a `SampleOrder`, which continues exactly where it stopped.

    All of its state is the number of samples handed out since the start of training, over all ranks, and the findings
    made in them. Both are counted here, in the main process, so batches that workers have prepared but nobody has seen
    are simply prepared again. The number is the same on all ranks; the findings are this rank's.

    One pass has as many full batches as an epoch; the next one continues with the samples that are left. Do not iterate
    over it twice at the same time.

    With another batch size or number of devices a run continues with the next sample all the same: those handed out are
    handed out, and the others follow in their order in batches of the new size.

    Attributes:
        dataset: The samples.
        wait_seconds: How long the training loop has waited for batches so far.
    """

    def __init__(
        self,
        dataset: PairDataset,
        order: SampleOrder,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Batches of `dataset` for device `rank` of `world_size`.

        Args:
            dataset: The samples.
            order: Which come when.
            batch_size: Samples per device and batch.
            rank: Number of this device, from 0.
            world_size: Number of devices.
            num_workers: Processes that decode; 0 decodes in this one.
            pin_memory: Deliver in page-locked memory, for faster copies to a GPU.

        Raises:
            ValueError: If an epoch is smaller than one global batch.
        """
        self._sampler = _RestOfPass(order, batch_size=batch_size, rank=rank, world_size=world_size)
        self._rank = rank
        self.dataset = dataset
        self.wait_seconds = 0.0
        self._options = loader_options(num_workers, pin_memory)
        self._loader = self._idle_loader()

    def close(self) -> None:
        """Stop the workers; another pass over the loader would start new ones.

        Left to the garbage collector, each may take five seconds to stop.
        """
        self._loader = self._idle_loader()

    def _idle_loader(self) -> DataLoader[Sample]:
        return DataLoader(_DrawnSamples(self.dataset), batch_sampler=self._sampler, collate_fn=collate, **self._options)

    def __len__(self) -> int:
        """Batches of a pass, wherever in it the loader stands."""
        return self._sampler.batches_per_pass

    def __iter__(self) -> Iterator[Batch]:
        """The batches from here to the end of the pass."""
        batches = _recorded(self._loader, self.dataset)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            # Before the yield: a checkpoint saved while this batch is in use must not repeat it.
            self._sampler.advance()
            yield batch

    @property
    def findings(self) -> Findings:
        """What was found wrong so far, on this device."""
        return self.dataset.findings

    def first_samples(self, count: int) -> list[Sample]:
        """The first samples of the data set, as validation would show them."""
        return [self.dataset[i] for i in range(min(count, len(self.dataset)))]

    def spread_samples(self, count: int) -> list[Sample]:
        """Samples from all over the data set; the same on every rank."""
        n_samples = len(self.dataset)
        count = min(count, n_samples)
        return [self.dataset[i * n_samples // count] for i in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """How many samples were handed out, what that number means, and the data set's findings."""
        return {**self._sampler.state_dict(), "findings": self.dataset.findings.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the samples that `state` counts.

        Raises: ValueError if it was saved with another seed, number of samples or window, or by another version.
        """
        self._sampler.load_state_dict(state)
        self.dataset.findings.load_state_dict(state["findings"], with_unnamed=self._rank == 0)


class _DrawnSamples(Dataset[Sample]):
    """The data set as the sampler asks for it."""

    def __init__(self, dataset: PairDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, i_and_draw: tuple[int, int]) -> Sample:
        return self._dataset.sample(*i_and_draw)


def _recorded(batches: Iterable[Batch], dataset: PairDataset) -> Iterator[Batch]:
    """The batches; what workers found in making them is noted in this process's data set."""
    for batch in batches:
        dataset.findings.add(batch["findings"], n_wanted=len(batch["index"]))
        yield batch


class _RestOfPass:
    """A batch sampler: each time it yields (sample number, draw) from where it stands to the end of the pass."""

    def __init__(self, order: SampleOrder, *, batch_size: int, rank: int, world_size: int) -> None:
        self._order = order
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self.batches_per_pass = batches_per_epoch(order.n_samples, batch_size=batch_size, world_size=world_size)
        self._n_samples = self._n_batches_of_pass = 0  # handed out

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self._n_samples + self._rank * self._batch_size
        # A batch size that is larger than before may leave nothing of the pass.
        for _ in range(self._n_batches_of_pass % self.batches_per_pass, self.batches_per_pass):
            ids, draws = self._order.take(start, start + self._batch_size)
            yield list(zip(ids.tolist(), draws.tolist(), strict=True))
            start += self._batch_size * self._world_size

    def advance(self) -> None:
        """A batch was handed out."""
        self._n_samples += self._batch_size * self._world_size
        self._n_batches_of_pass = self._n_batches_of_pass % self.batches_per_pass + 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples_handed_out": self._n_samples,
            "batches_of_pass": self._n_batches_of_pass,
            "global_batch_size": self._batch_size * self._world_size,
            **self._order.settings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "samples_handed_out" not in state:
            raise ValueError(
                "the order of samples can only be resumed with the backend and the version of dalle1 that saved it; "
                "use these, or start a new run"
            )
        self._order.check_settings(state, what="samples")
        size = self._batch_size * self._world_size
        if state["global_batch_size"] != size and self._rank == 0:
            logger.warning(
                "continuing after sample %s with %s samples in a batch over all devices, not %s as before",
                *(f"{number:,}" for number in (state["samples_handed_out"], size, state["global_batch_size"])),
            )
        self._n_samples = state["samples_handed_out"]
        # Of a pass of another length too, because Lightning counts on from there.
        self._n_batches_of_pass = min(state["batches_of_pass"], self.batches_per_pass)


class ValidationLoader(DataLoader[Sample]):
    """Batches of a `PairDataset`, whose findings are kept complete."""

    dataset: PairDataset

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """All batches."""
        return _recorded(super().__iter__(), self.dataset)

    def first_samples(self, count: int) -> list[Sample]:
        """The first samples of the data set, on every rank the same."""
        return [self.dataset[i] for i in range(min(count, len(self.dataset)))]


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
    options = loader_options(num_workers, pin_memory)
    return ValidationLoader(dataset, sampler=mine, batch_size=batch_size, collate_fn=collate, **options)


def loader_options(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """Arguments of every `DataLoader` here."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": pin_memory,
        # Every pass draws a seed for its workers. Drawn from the global generator, as is the default, it would
        # change the noise of a run that is resumed.
        "generator": torch.Generator(),
        "worker_init_fn": outlive_stop_signals,
    }


def outlive_stop_signals(_: int) -> None:
    """Of a worker: go on when a scheduler ends all processes, because training needs some more batches to end well."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # At last it must end all the same: so does Python end workers that hang.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
