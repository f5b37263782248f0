"""What travels in the file of a sampled picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle1.data.sampled_picture import picture_text, read_sampled_picture
from dalle1.evaluation.pictures import save_picture

TOKENS = torch.arange(1024).view(32, 32) * 7


def _file(path: Path, **changes: str) -> bytes:
    hashes = {"transformer": "aa", "dvae": "bb"}
    text = picture_text(TOKENS, prompt=" 日本 ", seed=5, candidate=3, score=0.25, hashes=hashes) | changes
    save_picture(Image.new("RGB", (4, 4)), path, text={name: value for name, value in text.items() if value != "-"})
    return path.read_bytes()


def test_prompt_and_tokens_come_back(tmp_path: Path) -> None:
    data = _file(tmp_path / "a.png")
    assert len(data) < 4000, "tokens are compressed"
    sampled = read_sampled_picture(data)
    assert sampled is not None
    assert sampled.prompt == "日本"
    tokens = sampled.tokens_of("bb", (32, 32))
    assert tokens is not None
    assert torch.equal(tokens, TOKENS)


def test_tokens_are_those_of_one_dvae_and_grid(tmp_path: Path) -> None:
    sampled = read_sampled_picture(_file(tmp_path / "a.png"))
    assert sampled is not None
    assert sampled.tokens_of("other", (32, 32)) is None
    assert sampled.tokens_of("bb", (16, 64)) is None


@pytest.mark.parametrize(
    "text", ["-", "", "[", "null", "7", "[1,2]", "[[1,2],[3]]", "[[-1]]", '[["a"]]', "[[1e99]]", "[" * 5000]
)
def test_tokens_that_cannot_be_read_are_none(tmp_path: Path, text: str) -> None:
    sampled = read_sampled_picture(_file(tmp_path / "a.png", image_tokens=text))
    assert sampled is not None
    assert sampled.image_tokens is None


@pytest.mark.parametrize("changes", [{"prompt": "-"}, {"dvae_sha256": "-"}])
def test_pictures_of_other_programs_have_neither(tmp_path: Path, changes: dict[str, str]) -> None:
    assert read_sampled_picture(_file(tmp_path / "a.png", **changes)) is None


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_what_is_no_png_was_not_sampled(data: bytes) -> None:
    assert read_sampled_picture(data) is None
