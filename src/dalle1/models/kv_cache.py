"""Keys and values of the states that a transformer has already seen, so that decoding computes only the new one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Preallocated keys and values of every layer; `length` states are stored so far.

    `keys` and `values` are (n_layers, b, n_heads, capacity, head_dim).
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, *, n_layers: int, batch: int, n_heads: int, length: int, head_dim: int, like: Tensor) -> "KVCache":
        """Room for `length` states, with the type and device of `like`."""
        shape = (n_layers, batch, n_heads, length, head_dim)
        return cls(torch.empty(shape, dtype=like.dtype, device=like.device), like.new_empty(shape))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new (b, n_heads, s, head_dim) after the current `length`; return all stored ones, those included.

        `length` moves on only when the caller has passed all layers.
        """
        stop = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : stop] = keys
        self.values[layer, :, :, self.length : stop] = values
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    @classmethod
    def cat(cls, caches: "Sequence[KVCache]") -> "KVCache":
        """The sequences of several caches of the same `length` in one; a cache may occur more than once."""
        keys = torch.cat([cache.keys for cache in caches], dim=1)
        values = torch.cat([cache.values for cache in caches], dim=1)
        return cls(keys, values, caches[0].length)
