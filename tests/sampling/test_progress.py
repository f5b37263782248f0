"""The progress bar."""

from __future__ import annotations

import io

import pytest
import torch

from dalle1.sampling.progress import Progress, ProgressBar
from dalle1.sampling.sampler import Block


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _progress(tokens_done: int, candidates_done: int, *, known: int = 0) -> Progress:
    block = Block(prompts=range(1), candidates=range(1), image_tokens=torch.zeros(1, 1, 1, 1))
    return Progress(
        tokens_known=known,
        tokens_done=tokens_done,
        tokens=24,
        candidates_done=candidates_done,
        candidates=3,
        block=block,
        positions_done=1,
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_show_tokens_and_pictures_on_terminals_only(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stream = _Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with ProgressBar() as bar:
        bar.sampled(_progress(8, 0))
        bar.sampled(_progress(24, 3))
        bar.finished(1)
        bar.finished(3)
    if is_terminal:
        assert "24/24" in stream.getvalue()
        assert "3/3 pictures" in stream.getvalue()
        assert " tokens/s" in stream.getvalue()
        assert "decoding: 100%" in stream.getvalue()
    else:
        assert stream.getvalue() == ""


def test_speed_counts_only_what_was_sampled_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", _Terminal())
    with ProgressBar() as bar:
        bar.sampled(_progress(20, 2, known=16))
        bar.sampled(_progress(24, 3, known=16))
        assert bar._tokens is not None
        assert (bar._tokens.initial, bar._tokens.n, bar._tokens.total) == (16, 24, 24)
