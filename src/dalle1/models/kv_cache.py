"""Keys and values of earlier image states, as many as each layer's pattern can still attend to.

| pattern | what is kept | slot of state i |
|---|---|---|
| `row`, `conv` | a ring as long as the pattern reaches back | i % length |
| `column` | all states, column by column, so that a column is one slice | column * height + row |
| `full` | all states | i |

Text states are not here: all candidates of a prompt share them, see `decoding`.

Shapes: r rows (sequences), h heads, e head_dim.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.options import AttentionPattern


def count_slots(layout: StreamLayout, pattern: AttentionPattern) -> int:
    """Image states that a layer of this pattern keeps."""
    if pattern == "column":
        return layout.grid_height * layout.grid_width
    reach = max(layout.offsets(pattern)) + 1
    return min(reach, layout.image_states)


class ImageStates:
    """What one layer keeps of the image states of r sequences."""

    def __init__(
        self, layout: StreamLayout, pattern: AttentionPattern, shape: tuple[int, int, int], like: Tensor
    ) -> None:
        """Room for `shape` = (r, h, e), with the type and device of `like`."""
        self._pattern = pattern
        self._height, self._width = layout.grid_height, layout.grid_width
        self._slots = count_slots(layout, pattern)
        rows, heads, head_dim = shape
        self._keys = like.new_empty(rows, heads, self._slots, head_dim)
        self._values = torch.empty_like(self._keys)
        attended = torch.zeros(self._slots, dtype=torch.bool, device=like.device)
        offsets = [offset for offset in layout.offsets(pattern) if offset < self._slots]
        attended[offsets] = True
        # Of a ring, newest first; None if all that is kept is attended to.
        self._attended = None if pattern == "column" or bool(attended.all()) else attended

    def append(
        self, state: int, keys: Float[Tensor, "r h e"], values: Float[Tensor, "r h e"]
    ) -> tuple[Float[Tensor, "r h k e"], Float[Tensor, "r h k e"], Bool[Tensor, " k"] | None]:
        """Store image state number `state`; return what it may attend to, itself included, and a mask of that or None.

        States come in order, from 0; each may be stored again before the next one.
        """
        if self._pattern == "column":
            row, column = divmod(state, self._width)
            first, slot = column * self._height, column * self._height + row
            stop = slot + 1
        else:
            first, slot = 0, state % self._slots
            stop = min(state + 1, self._slots)
        self._keys[:, :, slot] = keys
        self._values[:, :, slot] = values
        mask = None
        if self._attended is not None:
            ages = (state - torch.arange(stop, device=self._attended.device)) % self._slots
            mask = self._attended[ages]
        return self._keys[:, :, first:stop], self._values[:, :, first:stop], mask
