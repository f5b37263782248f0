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
from dataclasses import dataclass
from typing import Any

import numpy as np

# Words behind (seed, epoch, number) that tell apart what is drawn; a seed sequence is padded with zeros, so that the
# permutation of a window has none.
_OF_PIECES, _OF_PARTS, _OF_SHARES = 1, 2, 3
_OPTION_OF = {"seed": "data.seed", "window": "data.shuffle_window (which ends with the data)"}
_WINDOWS_KEPT = 2  # the present one and the next: thousands of batches ask for the same


class SampleOrder:
    """The order of all samples in all epochs, shuffled in windows.

    A data set is a row of blocks of samples that are cheap to read one after the other, such as shards. In each epoch
    the blocks are shuffled, and then the samples in each window of that row; a data set that fits into one window is
    shuffled as a whole. Large windows mix better, small ones read from few shards at a time.

    A block of weight w comes w times in an epoch; a fraction of w brings that share of the samples of all blocks that
    have this weight, others each epoch.
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
        self._block_sizes = sizes
        self._block_starts = np.cumsum(sizes) - sizes
        self._copies = np.ceil(weights).astype(np.int64)
        # A piece is one coming of one block, in one row for all: its block, and its how-manieth coming.
        self._piece_block = np.repeat(np.arange(len(sizes)), self._copies)
        self._piece_copy = np.arange(len(self._piece_block)) - np.repeat(
            np.cumsum(self._copies) - self._copies, self._copies
        )
        whole = np.floor(weights).astype(np.int64)
        self._shares = _shares(sizes, weights)
        # Of one epoch, repeated ones included.
        self.n_samples = int((sizes * whole).sum()) + sum(share.n_wanted for share in self._shares)
        if self.n_samples == 0:
            raise ValueError(f"an epoch must have at least one sample, got {sizes.sum()} with weights {set(weights)}")
        self._windows: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        # An epoch, its pieces, how many samples of each come, and up to the end of each.
        self._shuffled: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def settings(self) -> dict[str, int]:
        """What has to stay the same for a position to mean the same sample."""
        return {"seed": self._seed, "n_samples": self.n_samples, "window": min(self._window, self.n_samples)}

    def check_settings(self, saved: Mapping[str, Any], *, what: str) -> None:
        """Raise ValueError, with what differs, unless the order of `what` was saved with these settings."""
        changes = [
            f"{_OPTION_OF.get(name, name)} {saved[name]}, not {now}"
            for name, now in self.settings.items()
            if saved[name] != now
        ]
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
        pieces, sizes, ends = self._shuffle_pieces(epoch)
        start = number * self._window
        stop = min(start + self._window, self.n_samples)
        ids, draws = [], []
        for place in range(int(np.searchsorted(ends, start, side="right")), len(pieces)):
            block, size = int(self._piece_block[pieces[place]]), int(sizes[place])
            first = int(ends[place]) - size
            if first >= stop:
                break
            part = self._some_of_block(epoch, block, size)[max(start - first, 0) : stop - first]
            ids.append(part)
            draws.append(np.full(len(part), epoch * self._copies[block] + self._piece_copy[pieces[place]]))
        shuffled = np.random.default_rng([self._seed, epoch, number]).permutation(stop - start)
        return np.concatenate(ids)[shuffled], np.concatenate(draws)[shuffled]

    def _shuffle_pieces(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces in their order in this epoch, how many samples of each come, and up to the end of each."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            sizes = self._block_sizes[self._piece_block]
            last_pieces = np.cumsum(self._copies) - 1  # of each block; a fraction is the last
            for number, share in enumerate(self._shares):
                rng = np.random.default_rng([self._seed, epoch, number, _OF_SHARES])
                sizes[last_pieces[share.blocks]] = share.draw(rng)
            pieces = np.arange(len(sizes))
            if self.n_samples > self._window:  # else the one window shuffles everything
                pieces = np.random.default_rng([self._seed, epoch, 0, _OF_PIECES]).permutation(pieces)
            self._shuffled = epoch, pieces, sizes[pieces], np.cumsum(sizes[pieces])
        return self._shuffled[1:]

    def _some_of_block(self, epoch: int, block: int, size: int) -> np.ndarray:
        first, whole = int(self._block_starts[block]), int(self._block_sizes[block])
        if size == whole:
            return np.arange(first, first + size)
        return first + np.random.default_rng([self._seed, epoch, block, _OF_PARTS]).permutation(whole)[:size]


@dataclass(frozen=True, kw_only=True)
class _Share:
    """Blocks of which a share of the samples comes in each epoch, in all as many as can be."""

    blocks: np.ndarray  # int64 (blocks,), their numbers
    ends: np.ndarray  # int64 (blocks,), how many samples they have up to the end of each
    n_wanted: int

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """How many samples of each block come, int64 (blocks,): each sample is as likely as all others.

        Systematic sampling: every (total / n_wanted)-th sample of the row, from a start that is drawn.
        """
        total = int(self.ends[-1])
        return np.diff((self.ends * self.n_wanted + rng.integers(total)) // total, prepend=0)


def _shares(sizes: np.ndarray, weights: np.ndarray) -> list[_Share]:
    """Blocks by their weight, for all weights that are no whole numbers."""
    shares = []
    for weight in np.unique(weights[weights != np.floor(weights)]).tolist():
        blocks = np.flatnonzero(weights == weight)
        ends = np.cumsum(sizes[blocks])
        # A little more than the half that rounding takes: fractions are not exact.
        n_wanted = math.floor(int(ends[-1]) * (weight - math.floor(weight)) + 0.5 + 1e-9)
        if ends[-1]:
            shares.append(_Share(blocks=blocks, ends=ends, n_wanted=n_wanted))
    return shares


def batches_per_epoch(n_samples: int, *, batch_size: int, world_size: int) -> int:
    """How many full global batches an epoch has; `batch_size` is per device, `world_size` counts devices.

    Raises: ValueError if the samples do not fill a single one.
    """
    global_batch_size = batch_size * world_size
    if n_samples < global_batch_size:
        raise ValueError(
            f"the data set must fill one global batch of {global_batch_size} samples ({batch_size} per device on "
            f"{world_size} device(s)), got {n_samples}; lower optim.batch_size or add samples"
        )
    return n_samples // global_batch_size
