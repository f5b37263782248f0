"""How far sampling has come, and a bar that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr with tokens per second, time left and pictures done; hidden if stderr is no terminal."""
    with tqdm(desc="sampling", unit=" tokens", disable=None) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.tokens
            if bar.n == 0:
                bar.initial = bar.n = progress.tokens_known  # they took no time
            bar.set_postfix_str(f"{progress.candidates_done}/{progress.candidates} pictures", refresh=False)
            bar.update(progress.tokens_done - bar.n)

        yield show
