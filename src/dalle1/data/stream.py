"""Batches from shards that are read from beginning to end: for shards that are not on this machine.

    visits      all shards in another order each epoch (`SampleOrder`, here of shards), without an end
    slots       of the visits that are left, worker w of device r takes every n-th, n = devices * workers
    samples     of a visit in the order of the shard (`remote.read_shard`), thinned by filters
    buffer      where each sample waits for its turn, which is drawn
    batches     prepared as everywhere (`preparation`), in the worker

A batch says which visits it ends: a visit is done when all its samples were handed out. What a checkpoint keeps, of all
devices together, is which visits are done; so a run may be resumed with other numbers of devices and workers. Shards
that were begun are read again from their beginning: some of their samples come twice in that epoch, none is left out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dalle1.data.dataset import MOST_TRIES, BadSamples, OnBadSample
from dalle1.data.facts import read_facts
from dalle1.data.filters import FilterConfig, reason_to_drop
from dalle1.data.findings import Findings
from dalle1.data.loader import loader_options
from dalle1.data.order import SampleOrder
from dalle1.data.preparation import Batch, Preparation, Sample, collate
from dalle1.data.raw_sample import BadSampleError, RawSample
from dalle1.data.remote import read_shard
from dalle1.data.shard_scan import Damage

# Of batches that a training loader has: so many that no training gets to their end. Lightning needs a number, or else
# it takes a batch ahead, which a checkpoint would count as used.
_ENDLESS = 1 << 40
# Failures in a row, if there are fewer shards, after which there is nothing to wait for.
_MOST_FAILURES = 10


class StreamBatch(Batch):
    """A batch and what it says of the stream."""

    visits_done: list[int]  # all of whose samples have come, with this batch
    dropped: dict[str, int]  # how many samples filters have left out since the last batch, by reason


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a stream is read."""

    shards: tuple[str, ...]  # see `remote.expand_addresses`
    preparation: Preparation
    filters: FilterConfig
    on_bad_sample: OnBadSample
    max_bad_fraction: float
    batch_size: int  # per device
    buffer: int  # samples that wait for their turn in each worker, undecoded; >= 1


class VisitsDone:
    """Which visits, numbered from 0, are done: all below a number, and some above it."""

    def __init__(self) -> None:
        """None is."""
        self.all_below = 0
        self.others: set[int] = set()

    def add(self, visits: Iterable[int]) -> None:
        """These are done too."""
        self.others.update(visit for visit in visits if visit >= self.all_below)
        while self.all_below in self.others:
            self.others.remove(self.all_below)
            self.all_below += 1

    def add_below(self, number: int) -> None:
        """All below `number` are done too."""
        self.all_below = max(self.all_below, number)
        self.others = {visit for visit in self.others if visit >= self.all_below}
        self.add(())

    def left(self) -> Iterator[int]:
        """All that are not done, without an end."""
        return (visit for visit in count(self.all_below) if visit not in self.others)

    def state_dict(self) -> dict[str, Any]:
        """What to save, in plain types."""
        return {"all_below": self.all_below, "others": sorted(self.others)}


class _Samples:
    """Reads shards and prepares samples for one worker; counts what it finds and leaves out."""

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self._bad_samples = BadSamples(settings.on_bad_sample)
        self._reason = reason_to_drop(settings.filters)
        self._n_bad_in_a_row = 0
        self.findings: dict[str, str] = {}  # since the last batch
        self.dropped: Counter[str] = Counter()

    def read(self, shard: str) -> Iterator[RawSample]:
        """The samples of a shard that filters keep. Raises: BadSampleError for damage, if that is an error."""
        for raw in read_shard(shard, self._note_damage):
            try:
                reason = self._reason(read_facts(raw, self._settings.preparation.caption, self._settings.filters))
            except BadSampleError as error:
                self.note(raw.describe(), error)
                continue
            if reason is None:
                yield raw
            else:
                self.dropped[reason] += 1

    def prepare(self, raw: RawSample, draw: int) -> Sample | None:
        """What becomes of a sample; None if it is bad. Raises: BadSampleError if that is an error."""
        preparation = self._settings.preparation
        # Not the whole address: a copy of the shards elsewhere gives the same.
        name = f"{PurePosixPath(raw.container).name}/{raw.key}".encode("utf-8", "backslashreplace").decode()
        try:
            sample = preparation.sample(raw, name, draw, index=-1, findings=self.findings)
        except BadSampleError as error:
            self.note(raw.describe(), error)
            self._n_bad_in_a_row += 1
            if self._n_bad_in_a_row >= MOST_TRIES:
                raise BadSampleError(
                    f"at least one sample must be good, got {MOST_TRIES} bad ones in a row; the last: {error}"
                ) from error
            return None
        self._n_bad_in_a_row = 0
        return sample

    def _note_damage(self, damage: Damage) -> None:
        self._bad_samples.pass_over_damage(damage)
        self.findings[damage.message] = damage.kind

    def note(self, name: str, error: BadSampleError) -> None:
        """Remember a bad sample or damage. Raises: BadSampleError if that is an error."""
        self._bad_samples.pass_over(error)
        self.findings[name] = error.kind

    def batch(self, samples: list[Sample], visits_done: list[int]) -> StreamBatch:
        """These samples as a batch, with what was found since the last one."""
        plain = collate(samples)
        plain["findings"] = self.findings
        batch = StreamBatch(**plain, visits_done=visits_done, dropped=dict(self.dropped))
        self.findings, self.dropped = {}, Counter()
        return batch


class TrainStream(IterableDataset[StreamBatch]):
    """Batches of one device, without an end; see the module's docstring."""

    def __init__(self, settings: StreamSettings, order: SampleOrder, *, seed: int, rank: int, world_size: int) -> None:
        """Read as `settings` say, shards as `order` has them; `seed` decides the turns in the buffer."""
        self._settings = settings
        self._order = order
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.done = VisitsDone()  # when reading begins

    def __iter__(self) -> Iterator[StreamBatch]:
        """The batches of this worker.

        Raises: ValueError if no shard gives any sample.
        """
        worker = get_worker_info()
        n_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        slot, n_slots = self._rank * n_workers + number, self._world_size * n_workers
        samples = _Samples(self._settings)
        left: Counter[int] = Counter()  # of visits that are read: samples that wait in the buffer
        is_read: set[int] = set()
        done: list[int] = []
        ready: list[Sample] = []

        def end(visit: int) -> None:
            if visit in is_read and not left[visit]:
                is_read.remove(visit)
                del left[visit]
                done.append(visit)

        rng = np.random.default_rng([self._seed, slot, n_slots, self.done.all_below])
        for raw, visit, draw in _in_turns(self._arrivals(samples, slot, n_slots), self._settings.buffer, rng):
            if raw is None:  # the visit's last sample is in the buffer
                is_read.add(visit)
            elif draw is None:  # it is there now
                left[visit] += 1
            else:
                left[visit] -= 1
                sample = samples.prepare(raw, draw)
                if sample is not None:
                    ready.append(sample)
            end(visit)
            if len(ready) == self._settings.batch_size:
                yield samples.batch(ready, done)
                ready, done = [], []

    def _arrivals(self, samples: _Samples, slot: int, n_slots: int) -> Iterator[tuple[RawSample | None, int, int]]:
        """Samples as they are read, with their visit and draw; None where a visit ends."""
        n_without = 0
        for visit in islice(self.done.left(), slot, None, n_slots):
            ids, draws = self._order.take(visit, visit + 1)
            shard, n_read = self._settings.shards[int(ids[0])], 0
            for raw in samples.read(shard):
                n_read += 1
                yield raw, visit, int(draws[0])
            yield None, visit, int(draws[0])
            n_without = 0 if n_read else n_without + 1
            if n_without >= max(_MOST_FAILURES, self._order.n_samples):
                reasons = Counter(samples.findings.values()) + samples.dropped
                raise ValueError(
                    f"shards must hold samples, got none from {n_without} in a row, the last {shard!r}"
                    + (f" ({', '.join(f'{why} ({n:,})' for why, n in reasons.most_common(5))})" if reasons else "")
                )


def _in_turns(
    arrivals: Iterable[tuple[RawSample | None, int, int]], size: int, rng: np.random.Generator
) -> Iterator[tuple[RawSample | None, int, int | None]]:
    """Samples in a drawn order, each with its draw; and as news (without a draw) when each arrives, and ends of visits.

    The buffer fills while samples leave it, one for two that arrive, so that the first batch need not wait for it.
    """
    buffer: list[tuple[RawSample, int, int]] = []
    leaves = False
    for raw, visit, draw in arrivals:
        if raw is None:
            yield None, visit, None
            continue
        buffer.append((raw, visit, draw))
        yield raw, visit, None
        leaves = not leaves
        while len(buffer) > size or (leaves and len(buffer) > size // 10):
            leaves = False
            place = int(rng.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()


class StreamLoader:
    """Training batches of a stream; its state says which visits are done, on all devices.

    Attributes:
        findings: Bad samples and damaged shards met so far, and captions that were cut, on this device.
        dropped: How many samples filters have left out, by reason, on this device.
        wait_seconds: How long the training loop has waited for batches so far.
    """

    def __init__(
        self,
        settings: StreamSettings,
        order: SampleOrder,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Batches for device `rank` of `world_size`; see `TrainStream` and `ResumableLoader`."""
        self._settings = settings
        self._order = order
        self._rank = rank
        self._world_size = world_size
        self._stream = TrainStream(settings, order, seed=seed, rank=rank, world_size=world_size)
        self._done = VisitsDone()
        self._options = loader_options(num_workers, pin_memory)
        self._iterator: Iterator[StreamBatch] | None = None
        self.findings = Findings(max_bad_fraction=settings.max_bad_fraction)
        self.dropped: Counter[str] = Counter()
        self.wait_seconds = 0.0

    def close(self) -> None:
        """Stop the workers."""
        self._iterator = None

    def __len__(self) -> int:
        """More batches than any training needs: there is no end."""
        return _ENDLESS

    def __iter__(self) -> Iterator[StreamBatch]:
        """The batches from here on."""
        if self._iterator is None:
            self._stream.done.add_below(self._done.all_below)
            self._stream.done.add(self._done.others)
            self._iterator = iter(DataLoader(self._stream, batch_size=None, **self._options))
        while True:
            started = time.perf_counter()
            batch = next(self._iterator)
            self.wait_seconds += time.perf_counter() - started
            self._done.add(batch["visits_done"])
            self.dropped.update(batch["dropped"])
            self.findings.add(batch["findings"], n_wanted=len(batch["index"]))
            yield batch

    def first_samples(self, count: int) -> list[Sample]:
        """The first good samples of the first shards."""
        return first_samples(self._settings, count)

    def spread_samples(self, count: int) -> list[Sample]:
        """The first ones, as a stream cannot be asked for others."""
        return self.first_samples(count)

    def state_dict(self) -> dict[str, Any]:
        """Which visits are done on all devices, which must call this together."""
        mine = self._done.state_dict()
        parts: list[Any] = [mine]
        if self._world_size > 1:
            parts = [None] * self._world_size
            torch.distributed.all_gather_object(parts, mine)
        # A visit is one device's, so none is done twice; each device knows only of its own.
        done = VisitsDone()
        for part in parts:
            done.add_below(part["all_below"])
            done.add(part["others"])
        self._done = done  # what others have done need not be gathered again and again
        return {"visits": done.state_dict(), **self._order.settings, "findings": self.findings.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue without the visits that are done.

        Raises: ValueError if it was saved with another seed, number of shards or weights, or without a stream.
        """
        if "visits" not in state:
            raise ValueError(
                "a run whose data were indexed cannot go on with a stream: their orders have nothing in common; set "
                "data.backend=indexed, or start a new run"
            )
        self._order.check_settings(state, what="shards")
        self._done.add_below(state["visits"]["all_below"])
        self._done.add(state["visits"]["others"])
        self.findings.load_state_dict(state["findings"], with_unnamed=self._rank == 0)


class ValidationStream(IterableDataset[StreamBatch]):
    """Every sample once: each worker of a device reads some of the shards, each device takes every n-th sample."""

    def __init__(self, settings: StreamSettings, *, rank: int = 0, world_size: int = 1) -> None:
        """Read as `settings` say, without a buffer."""
        self._settings = settings
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[StreamBatch]:
        """The batches of this worker; the last one may be smaller."""
        worker = get_worker_info()
        n_workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        samples = _Samples(self._settings)
        ready: list[Sample] = []
        mine = (raw for shard in self._settings.shards[number::n_workers] for raw in samples.read(shard))
        for raw in islice(mine, self._rank, None, self._world_size):
            sample = samples.prepare(raw, draw=0)
            if sample is None:
                continue
            # Not before another one is there, so that the last batch has all that was found.
            if len(ready) == self._settings.batch_size:
                yield samples.batch(ready, [])
                ready = []
            ready.append(sample)
        if ready:
            yield samples.batch(ready, [])


class ValidationStreamLoader:
    """Batches of a `ValidationStream`, whose findings are kept complete; see `StreamLoader`."""

    def __init__(
        self,
        settings: StreamSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Batches for device `rank` of `world_size`."""
        self._settings = settings
        stream = ValidationStream(settings, rank=rank, world_size=world_size)
        self._loader = DataLoader(stream, batch_size=None, **loader_options(num_workers, pin_memory))
        self._first: list[Sample] = []
        self.findings = Findings(max_bad_fraction=settings.max_bad_fraction)
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[StreamBatch]:
        """All batches. Raises: ValueError if there is none for this device."""
        is_empty = True
        for batch in self._loader:
            self.findings.add(batch["findings"], n_wanted=len(batch["index"]))
            self.dropped.update(batch["dropped"])
            is_empty = False
            yield batch
        if is_empty:
            shards = self._settings.shards
            raise ValueError(
                f"data.val must hold samples for every device, got none in {len(shards)} shards, {shards[0]!r}"
            )

    def first_samples(self, count: int) -> list[Sample]:
        """The first good samples of the first shards."""
        if len(self._first) < count:
            self._first = first_samples(self._settings, count)
        return self._first[:count]


def first_samples(settings: StreamSettings, count: int) -> list[Sample]:
    """The first good samples of the first shards, at most `count`."""
    samples = _Samples(settings)
    good: Iterator[Sample] = (
        sample
        for shard in settings.shards
        for sample in (samples.prepare(raw, 0) for raw in samples.read(shard))
        if sample is not None
    )
    return list(islice(good, count))


def read_captions(settings: StreamSettings, findings: Findings) -> Iterator[str]:
    """All good captions in the order of the shards, to train a tokenizer on.

    Raises: BadSampleError for a missing, empty or undecodable caption if bad samples are errors.
    """
    samples = _Samples(settings)
    for shard in settings.shards:
        for raw in samples.read(shard):
            try:
                captions = settings.preparation.caption.read(raw)
            except BadSampleError as error:
                samples.note(raw.describe(), error)
                captions = []
            findings.add(samples.findings, n_wanted=1)
            samples.findings = {}
            yield from captions
        findings.add(samples.findings)
        samples.findings = {}
