"""Attention from the newest state of each row to what is kept: its text, shared, and its image.

Shapes: t text states, r rows (sequences), f rows with those that only fill up, g texts with n candidates each, h heads,
e head_dim, k image states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.kv_cache import ImageStates, Place
from dalle1.models.options import AttentionPattern

# Measured as in `decoding`: batched products of queries with keys and of probabilities with values have the same bits
# from 4 rows on. The smallest have a kernel of their own in PyTorch, below 400 = rows * inner * outer size. That held
# for heads of 8, 16, 20, 24, 62, 64, 100 and 128 dimensions, not of 10.
_MIN_QUERIES = 4
_MIN_PRODUCTS = 400  # of rows, inner and outer size


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """g texts with n candidates each, in one layer, and attention from these to those."""

    keys: Float[Tensor, "g h t e"]
    values: Float[Tensor, "g h t e"]
    candidates: int
    fill: bool  # rows, as many as products need

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self.keys) * self.candidates

    def spread(self, candidates: int) -> Texts:
        """The same with so many candidates for each of now."""
        return replace(self, candidates=self.candidates * candidates)

    def copy(self) -> Texts:
        """The same in memory of its own."""
        return replace(self, keys=self.keys.clone(), values=self.values.clone())

    def scores(self, q: Float[Tensor, "r h e"]) -> Float[Tensor, "r h t"]:
        """Products of queries with their text's keys."""
        return self._multiply(q, self.keys.mT)

    def mix(self, probs: Float[Tensor, "r h t"]) -> Float[Tensor, "r h e"]:
        """Values of their text, weighted."""
        return self._multiply(probs, self.values)

    def _multiply(self, x: Float[Tensor, "r h i"], y: Float[Tensor, "g h i o"]) -> Float[Tensor, "r h o"]:
        x = x.reshape(-1, self.candidates, *x.shape[1:]).transpose(1, 2)  # (g, h, n, i)
        if self.fill:
            least = max(_MIN_QUERIES, -(-_MIN_PRODUCTS // (y.shape[-2] * y.shape[-1])))
            x = F.pad(x, (0, 0, 0, max(0, least - self.candidates)))
        return (x @ y)[:, :, : self.candidates].transpose(1, 2).flatten(0, 1)


class LayerStates:
    """What one layer keeps: of the texts of all groups, and of the image of each row."""

    def __init__(self, layout: StreamLayout, pattern: AttentionPattern, texts: Sequence[Texts]) -> None:
        self.texts = list(texts)
        ends = list(accumulate((each.rows for each in texts), initial=0))
        self._rows_of = [slice(first, last) for first, last in pairwise(ends)]  # each group
        self.rows = ends[-1]
        like = texts[0].keys
        self.image = ImageStates(layout, pattern, (self.rows, like.shape[1], like.shape[3]), like)

    def attend(self, qkv: Float[Tensor, "f 1 3 h e"], state: int | Place) -> Float[Tensor, "f 1 h e"]:
        """From the newest state of each row to its text and its image; 0 for rows that only fill up."""
        q, k, v = qkv[: self.rows, 0].unbind(1)  # (r, h, e)
        keys, values, hidden = self.image.append(state, k, v)
        q = q / math.sqrt(q.shape[-1])
        own = q[:, :, None] @ keys.mT  # (r, h, 1, k)
        if hidden is not None:
            own = own.masked_fill(hidden, -math.inf)
        parts = list(zip(self.texts, self._rows_of, strict=True))
        told = _join([texts.scores(q[rows]) for texts, rows in parts])
        # In fp32 within PyTorch's kernels, also of 16 bits.
        probs = torch.cat([told, own[:, :, 0]], dim=-1).softmax(-1)
        of_text, of_image = probs[..., : told.shape[-1]], probs[..., told.shape[-1] :]
        y = _join([texts.mix(of_text[rows]) for texts, rows in parts])
        y = y + (of_image[:, :, None] @ values)[:, :, 0]
        more = len(qkv) - self.rows
        return (F.pad(y, (0, 0, 0, 0, 0, more)) if more else y)[:, None]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
