"""How a set of pictures uses the codebook, from counts of its codes; and when that is a collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

# A collapse leaves a handful of codes (4 of 512 in our trials); the least that a useful dVAE had was 26%.
_COLLAPSED_SHARE = 0.05
# Less than two codes used equally. Not more, because pictures with one flat background have few codes in most
# places: 96% of 512 codes in use, 32 dB and perplexity 9.5 is a good dVAE of the generated scenes.
_COLLAPSED_PERPLEXITY = 2.0


@dataclass(frozen=True, kw_only=True)
class CodebookUsage:
    """What counts of codes say; see `codebook_usage`."""

    vocab_size: int
    n_tokens: int  # counted
    n_used: int  # codes that occur
    perplexity: float  # exp of the entropy of the code frequencies, in [1, vocab_size]; equal use of n codes gives n

    @property
    def used_share(self) -> float:
        """Share of all codes that occur, in (0, 1]."""
        return self.n_used / self.vocab_size

    @property
    def n_dead(self) -> int:
        """Codes that do not occur."""
        return self.vocab_size - self.n_used

    @property
    def n_reachable(self) -> int:
        """Codes that so many tokens could have used."""
        return min(self.vocab_size, self.n_tokens)

    def __str__(self) -> str:
        return (
            f"{self.n_used} of {self.vocab_size} codes in use ({self.n_dead} dead), perplexity {self.perplexity:.1f}, "
            f"in {self.n_tokens} tokens"
        )


def codebook_usage(counts: Int[Tensor, " vocab_size"]) -> CodebookUsage:
    """Usage from how often each code occurs.

    Raises: ValueError if nothing was counted.
    """
    n_tokens = int(counts.sum())
    if n_tokens < 1:
        raise ValueError("codebook usage needs at least one token, got none")
    probs = counts[counts > 0].double() / n_tokens
    return CodebookUsage(
        vocab_size=len(counts),
        n_tokens=n_tokens,
        n_used=len(probs),
        perplexity=math.exp(-float((probs * probs.log()).sum())),
    )


def collapse_alarm(usage: CodebookUsage) -> str | None:
    """One sentence if the dVAE hardly uses its codebook: what must hold, what we got, what to change; else None.

    It has collapsed if less than 5% of the reachable codes occur, or if perplexity is below 2, or below 1 + 5% of the
    reachable codes where these are fewer than 20."""
    needed = math.ceil(_COLLAPSED_SHARE * usage.n_reachable)
    needed_perplexity = min(_COLLAPSED_PERPLEXITY, 1 + _COLLAPSED_SHARE * usage.n_reachable)
    if usage.n_used >= needed and (usage.perplexity >= needed_perplexity or usage.n_reachable == 1):
        return None
    return (
        f"code usage has collapsed: at least {needed} codes must be in use and perplexity must be >= "
        f"{needed_perplexity:g}, got {usage}; start the codes from features (optim.codebook_start_step > 0), lower "
        "optim.lr, cool more slowly (a larger optim.temperature_steps), or change optim.kl_weight: lower it if "
        "kl_per_position is near 0 (codes say nothing), raise it if that is near its most, "
        f"ln {usage.vocab_size} = {math.log(usage.vocab_size):.1f} (each position is sure of one of few codes)"
    )
