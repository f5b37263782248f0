"""Which samples come when: a pure function of the seed and of how many samples were handed out before.

Samples are handed out one after the other over all epochs: position p of a data set with n samples an epoch is number
p % n of epoch p // n, and `world_size` devices with `batch_size` samples each take the next `world_size * batch_size`
positions. So each sample is seen exactly once in each epoch, whatever the batches are (one of them may lie across two
epochs), a run can continue anywhere, also with batches of another size, and the number of loader workers cannot change
what is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Words behind (seed, epoch, number) that tell apart what is drawn; a seed sequence is padded with zeros, so that the
# permutation of a window has none.
_OF_PIECES, _OF_PARTS = 1, 2
_WINDOWS_KEPT = 2  # the present one and the next: thousands of batches ask for the same


class SampleOrder:
    """The order of all samples in all epochs, shuffled in windows.

    A data set is a row of blocks of samples that are cheap to read one after the other, such as shards. In each epoch
    the blocks are shuffled, and then the samples in each window of that row; a data set that fits into one window is
    shuffled as a whole. Large windows mix better, small ones read from few shards at a time.

    A block of weight w comes w times in an epoch; a fraction of w brings that share of its samples, others each epoch.
    """

    def __init__(
        self,
        block_sizes: Sequence[int] | np.ndarray,
        *,
        seed: int,
        window: int = 1 << 20,
        block_weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Order the samples of blocks, which are numbered through all blocks from 0.

        Args:
            block_sizes: Number of samples in each block.
            seed: Decides the order, >= 0.
            window: Samples that are shuffled together, >= 1.
            block_weights: How often each block comes in an epoch, > 0; once without.

        Raises:
            ValueError: If there are no samples, or so small weights that none is left.
        """
        sizes = np.asarray(block_sizes, dtype=np.int64)
        weights = np.ones(len(sizes)) if block_weights is None else np.asarray(block_weights, dtype=np.float64)
        self._seed = seed
        self._window = window
        # A piece is one coming of one block, in one row for all: its block, its how-manieth coming, its samples.
        self._piece_block, self._piece_copy, self._piece_size = _pieces(sizes, weights)
        self._block_sizes = sizes
        self._block_starts = np.cumsum(sizes) - sizes
        self._copies = np.ceil(weights).astype(np.int64)
        self.n_samples = int(self._piece_size.sum())  # of one epoch, repeated ones included
        if self.n_samples == 0:
            raise ValueError(f"an epoch must have at least one sample, got {sizes.sum()} with weights {set(weights)}")
        self._windows: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._shuffled: tuple[int, np.ndarray, np.ndarray] | None = None  # an epoch, its pieces, where they end

    @property
    def settings(self) -> dict[str, int]:
        """What has to stay the same for a position to mean the same sample."""
        return {"seed": self._seed, "n_samples": self.n_samples, "window": min(self._window, self.n_samples)}

    def check_settings(self, saved: Mapping[str, Any], *, what: str) -> None:
        """Raise ValueError, with what differs, unless the order of `what` was saved with these settings."""
        changes = [f"{name} {saved[name]}, not {now}" for name, now in self.settings.items() if saved[name] != now]
        if changes:
            raise ValueError(
                f"the order of {what} can only be resumed with the settings it was saved with: {'; '.join(changes)}; "
                "restore them, or start a new run"
            )

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions `start` to `stop` - 1: their numbers and their draws, both int64 (stop - start,).

        A draw counts how often a sample could have come before: it and the sample's number decide augmentation. With
        weight 1 it is the epoch.
        """
        ids, draws = [], []
        while start < stop:
            epoch, place = divmod(start, self.n_samples)
            number, offset = divmod(place, self._window)
            window_ids, window_draws = self._read_window(epoch, number)
            end = min(offset + stop - start, len(window_ids))
            ids.append(window_ids[offset:end])
            draws.append(window_draws[offset:end])
            start += end - offset
        return np.concatenate(ids or [np.empty(0, np.int64)]), np.concatenate(draws or [np.empty(0, np.int64)])

    def _read_window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        if (epoch, number) not in self._windows:
            while len(self._windows) >= _WINDOWS_KEPT:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, number] = self._make_window(epoch, number)
        return self._windows[epoch, number]

    def _make_window(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        pieces, ends = self._shuffle_pieces(epoch)
        start = number * self._window
        stop = min(start + self._window, self.n_samples)
        ids, draws = [], []
        for place in range(int(np.searchsorted(ends, start, side="right")), len(pieces)):
            piece = int(pieces[place])
            first = int(ends[place]) - int(self._piece_size[piece])
            if first >= stop:
                break
            part = self._piece_ids(epoch, piece)[max(start - first, 0) : stop - first]
            ids.append(part)
            block = self._piece_block[piece]
            draws.append(np.full(len(part), epoch * self._copies[block] + self._piece_copy[piece]))
        shuffled = np.random.default_rng([self._seed, epoch, number]).permutation(stop - start)
        return np.concatenate(ids)[shuffled], np.concatenate(draws)[shuffled]

    def _shuffle_pieces(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces in their order in this epoch, and how many samples there are up to the end of each."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            pieces = np.arange(len(self._piece_size))
            if self.n_samples > self._window:  # else the one window shuffles everything
                pieces = np.random.default_rng([self._seed, epoch, 0, _OF_PIECES]).permutation(pieces)
            self._shuffled = epoch, pieces, np.cumsum(self._piece_size[pieces])
        return self._shuffled[1:]

    def _piece_ids(self, epoch: int, piece: int) -> np.ndarray:
        block, size = int(self._piece_block[piece]), int(self._piece_size[piece])
        first, whole = int(self._block_starts[block]), int(self._block_sizes[block])
        if size == whole:
            return np.arange(first, first + size)
        return first + np.random.default_rng([self._seed, epoch, block, _OF_PARTS]).permutation(whole)[:size]


def _pieces(sizes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block, copy and number of samples of each piece, int64 (pieces,)."""
    blocks: list[int] = []
    copies: list[int] = []
    kept: list[int] = []
    left_over: dict[float, float] = {}  # of blocks of the same weight: what is lost by rounding goes to the next
    for block, (size, weight) in enumerate(zip(sizes.tolist(), weights.tolist(), strict=True)):
        whole = math.floor(weight)
        wanted = size * (weight - whole) + left_over.get(weight, 0.0)
        # A little more than the half that rounding takes: sums of fractions are not exact.
        part = min(size, math.floor(wanted + 0.5 + 1e-9))
        left_over[weight] = wanted - part
        counts = [size] * whole + [part] * (weight > whole)
        blocks += [block] * len(counts)
        copies += range(len(counts))
        kept += counts
    return np.array(blocks, dtype=np.int64), np.array(copies, dtype=np.int64), np.array(kept, dtype=np.int64)


def batches_per_epoch(n_samples: int, *, batch_size: int, world_size: int) -> int:
    """How many full global batches an epoch has; `batch_size` is per device, `world_size` counts devices.

    Raises: ValueError if the samples do not fill a single one.
    """
    global_batch_size = batch_size * world_size
    if n_samples < global_batch_size:
        raise ValueError(
            f"the data set must fill one global batch of {global_batch_size} samples ({batch_size} per device on "
            f"{world_size} device(s)), got {n_samples}; lower data.batch_size or add samples"
        )
    return n_samples // global_batch_size
