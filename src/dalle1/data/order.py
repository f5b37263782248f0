"""Which samples form which batch: pure functions of the seed and of the number of the batch.

Because nothing but that number moves on, a run can continue anywhere, and the number of loader workers
cannot change what is trained on. Batches are numbered from the start of training, across epochs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


# The last epoch and the next: batch_indices asks for the same permutation thousands of times.
@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_samples: int) -> np.ndarray:
    """The sample ids 0..n_samples-1 in the order of this epoch, int64 (n_samples,), read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(n_samples)
    order.setflags(write=False)
    return order


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


def batch_indices(
    seed: int, step: int, *, n_samples: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Sample ids that device `rank` sees in global batch number `step`, int64 (batch_size,).

    Each epoch has its own order and sees no sample twice. The samples that do not fill its last global batch
    are left out, other ones each epoch. The ranks' parts, joined in order, are the batch that a single device
    with `batch_size * world_size` would see.

    Raises: ValueError if the samples do not fill one global batch.
    """
    epoch, batch = divmod(step, batches_per_epoch(n_samples, batch_size=batch_size, world_size=world_size))
    start = (batch * world_size + rank) * batch_size
    return epoch_order(seed, epoch, n_samples)[start : start + batch_size]
