"""How far sampling has come, and a bar that shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

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
    """Bars on stderr, hidden if it is no terminal: tokens per second, time left, pictures sampled; pictures decoded."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._tokens: tqdm[NoReturn] | None = None
        self._pictures: tqdm[NoReturn] | None = None
        self._candidates: int | None = None

    def __enter__(self) -> ProgressBar:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they are."""
        for bar in (self._pictures, self._tokens):
            if bar is not None:
                bar.close()

    def sampled(self, progress: Progress) -> None:
        """Show how far sampling is."""
        if self._tokens is None:
            # What an earlier call sampled took no time.
            known = progress.tokens_known
            self._tokens = tqdm(
                desc="sampling", total=progress.tokens, initial=known, unit=" tokens", disable=None, position=0
            )
            self._tokens.n = known
        self._candidates = progress.candidates
        done = f"{progress.candidates_done}/{progress.candidates} pictures"
        self._tokens.set_postfix_str(done, refresh=False)
        self._tokens.update(progress.tokens_done - self._tokens.n)

    def finished(self, pictures: int) -> None:
        """Show how many pictures were decoded, and ranked if they are."""
        if self._pictures is None:
            self._pictures = tqdm(desc="decoding", total=self._candidates, unit=" pictures", disable=None, position=1)
        self._pictures.update(pictures - self._pictures.n)
