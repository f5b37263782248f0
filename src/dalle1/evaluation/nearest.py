"""Nearest neighbours by cosine similarity: exact, in blocks, in the memory of one block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

_ROWS = 4096  # queries that are compared with a block at once: 4 MB of products with a block of 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Nearest:
    """Of each query its nearest reference, on the CPU."""

    similarities: Float[Tensor, " n"]  # cosines, float32 in [-1, 1]
    indices: Int[Tensor, " n"]  # of the references, in the order in which they came


@torch.inference_mode()
def nearest(
    queries: Float[Tensor, "n d"], blocks: Iterable[Float[Tensor, "m d"]], *, device: torch.device | str = "cpu"
) -> Nearest:
    """The reference with the largest cosine for each query; of equal ones the first.

    n queries and m references with d features take 2 n m d operations. In memory are the queries, one block of
    references and their products with 4096 queries; each reference is read once.

    Args:
        queries: Of any lengths; one of length 0 has the cosine 0 with all.
        blocks: References in parts of any number of rows, of any lengths.
        device: Where it is computed, in float32.

    Raises: ValueError if there is no reference, for features of different sizes, or that are not finite.
    """
    parts = [_directions(part, device) for part in torch.split(queries, _ROWS)]
    best = [torch.full((len(part),), -torch.inf, device=device) for part in parts]
    found = [torch.zeros(len(part), dtype=torch.int64, device=device) for part in parts]
    first = 0
    for block in blocks:
        if block.shape[1] != queries.shape[1]:
            raise ValueError(
                f"features must have the same size, got {queries.shape[1]} of queries, {block.shape[1]} of references"
            )
        references = _directions(block, device).T
        for number, part in enumerate(parts):
            values, places = (part @ references).max(1)  # of equal ones the first
            is_better = values > best[number]
            best[number] = torch.where(is_better, values, best[number])
            found[number] = torch.where(is_better, places + first, found[number])
        first += len(block)
    if not first:
        raise ValueError("a nearest neighbour needs at least one reference, got none")
    # Rounding can carry a cosine just beyond its bounds.
    return Nearest(similarities=torch.cat(best).clamp(-1, 1).cpu(), indices=torch.cat(found).cpu())


def _directions(features: Float[Tensor, "m d"], device: torch.device | str) -> Float[Tensor, "m d"]:
    if not features.isfinite().all():
        raise ValueError("features must be finite to be compared, got NaN or Inf; take another extractor")
    return normalize(features.float(), dim=1).to(device)
