"""When a training loss explodes: a rule that knows nothing of what is trained."""

from __future__ import annotations

import math
from collections import deque


class LossWatch:
    """Compares each loss with those of the last `window` good updates, without a word until it has seen so many.

    A loss has exploded if it exceeds their mean by more than `threshold` of their standard deviations. That holds for
    losses of any size and sign; one that rises steadily through the window is hardly more than sqrt(3) deviations above
    its mean.
    """

    def __init__(self, *, window: int, threshold: float | None) -> None:
        """Watch; without a `threshold` nothing explodes."""
        self._threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)

    def objection(self, loss: float) -> str | None:
        """What is wrong with a loss, in some words; None if nothing is."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if self._threshold is None or len(self._losses) < (self._losses.maxlen or 0):
            return None
        n_losses = len(self._losses)
        mean = math.fsum(self._losses) / n_losses
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in self._losses) / n_losses)
        # Equal losses have no deviation, but for rounding in fp32, which is no explosion.
        if loss - mean <= self._threshold * max(deviation, 1e-6 * abs(mean)):
            return None
        return (
            f"its loss is {loss:.4g}, more than {self._threshold:g} deviations above that of the last {n_losses} "
            f"updates, {mean:.4g} +- {deviation:.2g}"
        )

    def add(self, loss: float) -> None:
        """Remember the loss of a good update."""
        self._losses.append(loss)

    def forget(self) -> None:
        """Start over: from here on the loss is another one."""
        self._losses.clear()

    def state_dict(self) -> list[float]:
        """The losses that are remembered."""
        return list(self._losses)

    def load_state_dict(self, losses: list[float]) -> None:
        """Go on from `state_dict`, with another window from the last of them."""
        self.forget()
        self._losses.extend(losses)
