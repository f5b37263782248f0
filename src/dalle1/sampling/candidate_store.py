"""Where sampled tokens are kept, so that nothing is sampled twice."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Int
from torch import Tensor


class CandidateStore(Protocol):
    """Tokens of the first candidates of each prompt; prompts are known by their place in the list."""

    def count(self, prompt: int) -> int:
        """How many there are."""

    def load(self, prompt: int) -> Int[Tensor, "n gh gw"] | None:
        """All there are, int64, on the CPU."""

    def save(self, prompt: int, image_tokens: Int[Tensor, "n gh gw"]) -> None:
        """Keep these, those that were kept before among them."""


class MemoryStore:
    """Keeps tokens as long as it lives."""

    def __init__(self) -> None:
        """Start empty."""
        self._tokens: dict[int, Int[Tensor, "n gh gw"]] = {}

    def count(self, prompt: int) -> int:
        """See `CandidateStore`."""
        return len(self._tokens.get(prompt, ()))

    def load(self, prompt: int) -> Int[Tensor, "n gh gw"] | None:
        """See `CandidateStore`."""
        return self._tokens.get(prompt)

    def save(self, prompt: int, image_tokens: Int[Tensor, "n gh gw"]) -> None:
        """See `CandidateStore`."""
        self._tokens[prompt] = image_tokens
