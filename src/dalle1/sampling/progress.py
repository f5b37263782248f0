"""A progress bar for the decoding loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from dalle1.sampling.generate import Progress


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr with tokens per second, time left and pictures done; hidden if stderr is no terminal."""
    with tqdm(desc="sampling", unit=" tokens", disable=None) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.tokens
            bar.set_postfix_str(f"{progress.candidates_done}/{progress.candidates} pictures", refresh=False)
            bar.update(progress.tokens_done - bar.n)

        yield show
