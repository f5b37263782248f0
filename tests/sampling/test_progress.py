"""The progress bar."""

from __future__ import annotations

import io

import pytest

from dalle1.sampling.generate import Progress
from dalle1.sampling.progress import progress_bar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bar_shows_tokens_and_pictures_on_terminals_only(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stream = _Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar() as show:
        show(Progress(tokens_done=8, tokens=24, candidates_done=0, candidates=3))
        show(Progress(tokens_done=24, tokens=24, candidates_done=3, candidates=3))
    if is_terminal:
        assert "24/24" in stream.getvalue()
        assert "3/3 pictures" in stream.getvalue()
        assert " tokens/s" in stream.getvalue()
    else:
        assert stream.getvalue() == ""
