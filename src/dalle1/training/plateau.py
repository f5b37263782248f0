"""A learning rate that is halved whenever the training loss has stopped falling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dalle1.training.optim import OptimConfig


class PlateauHalving:
    """Watches the training loss and says which share of the peak learning rate is left.

    The paper halved by hand and gives no rule (Ramesh et al. 2021, app. B.2). Ours: the loss is averaged over windows
    of `plateau_window` updates, the first one after the warm-up. Once `plateau_patience` windows in a row were not
    lower than the best before them by more than `plateau_threshold` of its absolute value (likelihoods of pictures
    are densities, so a loss may be negative), the rate is halved and counting starts over. It stops at final_lr.

    The loss stays on its device; it is read once per window, as the mean over ranks, so all ranks decide the same.
    """

    def __init__(self, config: OptimConfig, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Start at the peak."""
        self._config = config
        self._mean_over_ranks = mean_over_ranks
        self._updates = 0  # made so far
        self._loss_sum: Tensor | float = 0.0  # over the updates of this window so far
        self._update_loss: Tensor | float = 0.0  # of the coming update, over its parts so far
        self._is_dropped = False  # the coming update
        self._best: float | None = None  # loss of a window
        self._stalled = 0  # windows in a row that were no better
        self._halvings = 0

    @property
    def share(self) -> float:
        """Of the peak learning rate, for the coming update, without the warm-up: in [final_lr / lr, 1]."""
        return max(0.5**self._halvings, self._config.final_lr / self._config.lr)

    @property
    def _is_watching(self) -> bool:
        return self._updates >= self._config.warmup_steps and self.share > self._config.final_lr / self._config.lr

    def add(self, loss: Tensor) -> None:
        """Count the loss of an update, or one of several parts that sum to it."""
        if self._is_watching:
            self._update_loss = self._update_loss + loss.detach().float()

    def drop_update(self) -> None:
        """The coming update is bad: its loss, which may be NaN, does not count, so the window is an update longer."""
        self._is_dropped = True

    def end_update(self) -> None:
        """Count an update, and decide if it ends a window."""
        loss, self._update_loss = self._update_loss, 0.0
        if self._is_dropped:
            self._is_dropped = False
            return
        self._loss_sum = self._loss_sum + loss
        was_watching = self._is_watching
        self._updates += 1
        window = self._config.plateau_window
        if not was_watching or (self._updates - self._config.warmup_steps) % window:
            return
        loss = self._synchronized_sum() / window
        self._loss_sum = 0.0
        if self._best is None or loss < self._best - self._config.plateau_threshold * abs(self._best):
            self._best, self._stalled = loss, 0
            return
        self._stalled += 1
        if self._stalled == self._config.plateau_patience:
            self._halvings += 1
            self._stalled = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers to continue from. All ranks must call it: it averages over them."""
        # Every rank goes on from what the checkpoint holds, as they would after a resume.
        self._loss_sum = self._synchronized_sum()
        return {
            "updates": self._updates,
            "loss_sum": self._loss_sum,
            "best": self._best,
            "stalled": self._stalled,
            "halvings": self._halvings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._updates, self._loss_sum = state["updates"], state["loss_sum"]
        self._best, self._stalled, self._halvings = state["best"], state["stalled"], state["halvings"]

    def _synchronized_sum(self) -> float:
        if isinstance(self._loss_sum, float):  # before the window's first loss: the same on all ranks
            return self._loss_sum
        return float(self._mean_over_ranks(self._loss_sum.clone()))
