"""How far sampling has come, and a bar that shows it."""

from __future__ import annotations

from dataclasses import dataclass

from tqdm import tqdm

from dalle1.sampling.sampler import Block


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a call of the pipeline is."""

    tokens_known: int  # from an earlier call
    tokens_done: int  # those among them
    tokens: int  # in all
    candidates_done: int
    candidates: int
    block: Block  # what is being decoded
    positions_done: int  # of the block


class ProgressBar:
    """A bar on stderr with tokens per second, time left and pictures done; hidden if stderr is no terminal."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bar = tqdm(desc="sampling", unit=" tokens", disable=None)
        self._sampled = ""

    def __enter__(self) -> ProgressBar:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def sampled(self, progress: Progress) -> None:
        """Show how far sampling is."""
        self._bar.total = progress.tokens
        if self._bar.n == 0:
            self._bar.initial = self._bar.n = progress.tokens_known  # they took no time
        self._sampled = f"{progress.candidates_done}/{progress.candidates} pictures"
        self._bar.set_postfix_str(self._sampled, refresh=False)
        self._bar.update(progress.tokens_done - self._bar.n)

    def finished(self, pictures: int) -> None:
        """Show how many pictures were decoded, and ranked if they are."""
        self._bar.set_postfix_str(f"{self._sampled}, {pictures} decoded".removeprefix(", "))
