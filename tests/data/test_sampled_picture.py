"""What travels in the file of a sampled picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle1.data.sampled_picture import picture_text, read_sampled_picture
from dalle1.evaluation.pictures import save_picture

TOKENS = torch.arange(1024).view(32, 32) * 7


def _file(path: Path, *, painted: bool = False, **changes: str) -> bytes:
    picture = Image.new("RGB", (4, 4))
    text = picture_text(
        picture,
        TOKENS,
        prompt=" 日本 ",
        seed=5,
        candidate=3,
        score=0.25,
        sampling={"temperature": 0.7},
        hashes={"transformer": "aa", "dvae": "bb"},
    )
    if painted:
        picture.putpixel((1, 2), (1, 0, 0))
    text = {name: value for name, value in (text | changes).items() if value != "-"}
    save_picture(picture, path, text=text)
    return path.read_bytes()


def test_prompt_and_tokens_come_back(tmp_path: Path) -> None:
    data = _file(tmp_path / "a.png")
    assert len(data) < 4000, "tokens are compressed"
    sampled = read_sampled_picture(data)
    assert sampled is not None
    assert sampled.prompt == "日本"
    tokens = sampled.tokens_of("bb", grid=(32, 32), vocab_size=8192)
    assert tokens is not None
    assert torch.equal(tokens, TOKENS)


@pytest.mark.parametrize(
    ("dvae_sha256", "grid", "vocab_size"), [("other", (32, 32), 8192), ("bb", (16, 64), 8192), ("bb", (32, 32), 7161)]
)
def test_tokens_are_those_of_one_dvae_and_grid(
    tmp_path: Path, dvae_sha256: str, grid: tuple[int, int], vocab_size: int
) -> None:
    sampled = read_sampled_picture(_file(tmp_path / "a.png"))
    assert sampled is not None
    assert sampled.tokens_of(dvae_sha256, grid=grid, vocab_size=vocab_size) is None


def test_painted_picture_has_a_prompt_and_no_tokens(tmp_path: Path) -> None:
    sampled = read_sampled_picture(_file(tmp_path / "a.png", painted=True))
    assert sampled is not None
    assert (sampled.prompt, sampled.image_tokens) == ("日本", None)


@pytest.mark.parametrize(
    "text",
    [
        "-",
        "",
        "[",
        "null",
        "7",
        "[1,2]",
        "[[1,2],[3]]",
        "[[-1]]",
        '[["a"]]',
        "[[1e99]]",
        "[[1.7]]",
        "[[true]]",
        "[[" + "9" * 30 + "]]",
        "[" * 5000,
    ],
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
