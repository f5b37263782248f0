"""Keys and values of earlier image states, as many as each layer's pattern can still attend to.

| pattern | what is kept | slot of state i |
|---|---|---|
| `row`, `conv` | a ring as long as the pattern reaches back | i % length |
| `column` | all states, column by column, so that a column is one slice | column * height + row |
| `full` | all states | i |

Text states are not here: all candidates of a prompt share them, see `decoding`.

A state is a number, and what is read for it a slice. Or it is a `Place`: tensors of the same shapes for every state, so
that the same operations in the same memory serve all of them, which a CUDA graph needs.

Shapes: r rows (sequences), h heads, e head_dim, k slots that are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.options import AttentionPattern


def count_slots(layout: StreamLayout, pattern: AttentionPattern) -> int:
    """Image states that a layer of this pattern keeps."""
    if pattern == "column":
        return layout.grid_height * layout.grid_width
    reach = max(layout.offsets(pattern)) + 1
    return min(reach, layout.image_states)


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where the layers of a pattern store a state, and what they read for it."""

    slot: Int[Tensor, " 1"]
    column: Int[Tensor, " 1"] | None  # of the grid, all that is read; without it all slots are
    hidden: Bool[Tensor, " k"]  # what of that the state may not attend to


class Places:
    """The places of all states, for the layers of one pattern."""

    def __init__(self, layout: StreamLayout, pattern: AttentionPattern, device: torch.device) -> None:
        """Tables on `device`: at most one bool for each pair of states."""
        states = torch.arange(layout.image_states, device=device)
        self._columns: Int[Tensor, " m"] | None = None
        if pattern == "column":
            rows, self._columns = states // layout.grid_width, states % layout.grid_width
            self._slots = self._columns * layout.grid_height + rows
            self._hidden = torch.arange(layout.grid_height, device=device) > rows[:, None]
            return
        length = count_slots(layout, pattern)
        self._slots = states % length
        ages = (states[:, None] - torch.arange(length, device=device)) % length
        # A ring has nothing older than the first state.
        self._hidden = _hidden_ages(layout, pattern, device)[ages] | (ages > states[:, None])

    def at(self, state: Int[Tensor, " 1"]) -> Place:
        """The place of a state, whose number the device alone knows."""
        return Place(
            slot=self._slots.index_select(0, state),
            column=None if self._columns is None else self._columns.index_select(0, state),
            hidden=self._hidden.index_select(0, state)[0],
        )


def _hidden_ages(layout: StreamLayout, pattern: AttentionPattern, device: torch.device) -> Bool[Tensor, " k"]:
    """Which states of a ring are skipped, newest first."""
    hidden = torch.ones(count_slots(layout, pattern), dtype=torch.bool, device=device)
    hidden[[offset for offset in layout.offsets(pattern) if offset < len(hidden)]] = False
    return hidden


class ImageStates:
    """What one layer keeps of the image states of r sequences."""

    def __init__(
        self, layout: StreamLayout, pattern: AttentionPattern, shape: tuple[int, int, int], like: Tensor
    ) -> None:
        """Room for `shape` = (r, h, e), with the type and device of `like`."""
        self._by_column = pattern == "column"
        self._height, self._width = layout.grid_height, layout.grid_width
        self._slots = count_slots(layout, pattern)
        rows, heads, head_dim = shape
        # Zeros, because a masked number is multiplied by 0, and new memory may hold what that makes no zero of.
        self._keys = like.new_zeros(rows, heads, self._slots, head_dim)
        self._values = torch.zeros_like(self._keys)
        hidden = None if self._by_column else _hidden_ages(layout, pattern, like.device)
        # Of a ring, newest first; None if all that is kept is attended to.
        self._hidden = None if hidden is None or not bool(hidden.any()) else hidden

    def append(
        self, state: int | Place, keys: Float[Tensor, "r h e"], values: Float[Tensor, "r h e"]
    ) -> tuple[Float[Tensor, "r h k e"], Float[Tensor, "r h k e"], Bool[Tensor, " k"] | None]:
        """Store an image state; return what may be attended to, itself included, and what of that is hidden, if any is.

        States come in order, from 0; each may be stored again before the next one.
        """
        if isinstance(state, Place):
            return self._append_at(state, keys, values)
        if self._by_column:
            row, column = divmod(state, self._width)
            first, slot = column * self._height, column * self._height + row
            stop = slot + 1
        else:
            first, slot = 0, state % self._slots
            stop = min(state + 1, self._slots)
        self._keys[:, :, slot] = keys
        self._values[:, :, slot] = values
        hidden = None
        if self._hidden is not None:
            ages = (state - torch.arange(stop, device=self._hidden.device)) % self._slots
            hidden = self._hidden[ages]
        return self._keys[:, :, first:stop], self._values[:, :, first:stop], hidden

    def _append_at(self, place: Place, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._keys.index_copy_(2, place.slot, keys[:, :, None])
        self._values.index_copy_(2, place.slot, values[:, :, None])
        if place.column is None:
            return self._keys, self._values, place.hidden
        shape = (*self._keys.shape[:2], self._width, self._height, -1)
        keys, values = (kept.view(shape).index_select(2, place.column)[:, :, 0] for kept in (self._keys, self._values))
        return keys, values, place.hidden

    def load(self, other: ImageStates, candidates: int) -> None:
        """Take over what `other` keeps of as many rows divided by `candidates`, each of them that many times."""
        for mine, its in ((self._keys, other._keys), (self._values, other._values)):
            mine.view(-1, candidates, *mine.shape[1:]).copy_(its[:, None])

    def clear(self) -> None:
        """Forget all states."""
        self._keys.zero_()
        self._values.zero_()
