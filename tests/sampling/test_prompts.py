"""Where the prompts of a run come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from dalle1.sampling.prompts import read_prompts


def test_one_prompt_is_taken_as_it_is() -> None:
    assert read_prompts("a red circle", None) == ["a red circle"]


def test_file_has_one_prompt_per_line_without_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa, b\r\n\n  \t\n  '${x}' #1 = ???\n日本🐉".encode())
    assert read_prompts(None, path) == ["a, b", "'${x}' #1 = ???", "日本🐉"]


@pytest.mark.parametrize(("prompt", "file", "got"), [(None, None, "neither"), ("a", "b.txt", "both")])
def test_exactly_one_source_is_needed(prompt: str | None, file: str | None, got: str) -> None:
    with pytest.raises(ValueError, match=f"give either prompt=... or prompts_file=..., got {got}"):
        read_prompts(prompt, file)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"one prompt per line, there is none at '.*nothing.txt'"):
        read_prompts(None, tmp_path / "nothing.txt")


def test_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"must hold at least one prompt, '.*blank.txt' holds none"):
        read_prompts(None, tmp_path / "blank.txt")


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"must be UTF-8 text, '.*latin.txt' is not"):
        read_prompts(None, tmp_path / "latin.txt")
