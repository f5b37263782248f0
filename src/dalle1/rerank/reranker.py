"""What a way of ranking pictures must be able to do.

Shapes: n pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Reranker(Protocol):
    """Gives each picture of a prompt a score; higher is better."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What identifies it, in plain types, for manifests: `kind`, and hashes or names of weights."""

    def to(self, device: torch.device) -> None:
        """Move the models it owns."""

    def check(self, prompt: str) -> None:
        """Raise ValueError if this prompt cannot be scored, before any picture is sampled."""

    def score(
        self, prompt: str, images: Float[Tensor, "n 3 h w"], image_tokens: Int[Tensor, "n gh gw"]
    ) -> Float[Tensor, " n"]:
        """Scores of pictures in [0, 1] and of the tokens that they were decoded from, on the CPU."""


def best_first(scores: Float[Tensor, " n"]) -> list[int]:
    """Numbers of the pictures from the highest score to the lowest; equal ones keep their order."""
    return [int(i) for i in scores.argsort(descending=True, stable=True)]
