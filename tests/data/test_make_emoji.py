"""The recipe of the emoji shards, on two pictures drawn here and lines as Unicode writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from dalle1.data.dataset import PairDataset
from dalle1.data.shards import ShardIndex

REPOSITORY = Path(__file__).parents[2]
NAMES = """# group: Smileys & Emotion
2764 FE0F                  ; fully-qualified     # ❤️ E0.6 red heart
2764                       ; unqualified         # ❤ E0.6 heart
1F600                      ; fully-qualified     # 😀 E1.0 grinning face
1F9D1 200D 2764 FE0F 200D 1F9D1 1F3FD ; fully-qualified # 🧑 E13.1 couple: person, medium-light skin tone
"""


@pytest.fixture(scope="module")
def script(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    """The script as a module."""
    return load_recipe("make_emoji")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with names, and with the pictures of two of them."""
    (tmp_path / "emoji-test.txt").write_text(NAMES, encoding="utf-8")
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    transparent.save(tmp_path / "emoji_u2764.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "emoji_u1f9d1_200d_2764_200d_1f9d1_1f3fd.png")
    return tmp_path


def make(script: ModuleType, source: Path, *options: str) -> None:
    names = str(source / "emoji-test.txt")
    script.main(["--images", str(source), "--names", names, "--out", str(source / "out"), *options])


def test_shards_hold_the_pictures_that_have_a_name_on_white(script: ModuleType, source: Path) -> None:
    make(script, source, "--image-size", "16")
    index = ShardIndex(str(source / "out" / "emoji-00000.tar"))
    assert list(index.captions()) == ["red heart", "couple person medium light skin tone"]
    white, red = (PairDataset(index, image_size=16)[i]["pixels"].float().mean((1, 2)).tolist() for i in range(2))
    assert white == pytest.approx([255, 255, 255], abs=2)
    assert red == pytest.approx([255, 0, 0], abs=2)


def test_same_input_gives_the_same_bytes_and_keys_go_on_in_the_next_shard(script: ModuleType, source: Path) -> None:
    shards = [source / "out" / f"emoji-0000{number}.tar" for number in range(2)]
    make(script, source, "--samples-per-shard", "1")
    before = [shard.read_bytes() for shard in shards]
    make(script, source, "--samples-per-shard", "1")
    assert [shard.read_bytes() for shard in shards] == before
    assert b"000000001.jpg" in before[1]


def test_damaged_picture_is_named_and_leaves_no_shard(
    script: ModuleType, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "emoji_u1f600.png").write_bytes(b"<html>")
    with pytest.raises(SystemExit):
        make(script, source)
    assert "emoji_u1f600.png' must be a picture, but it is not a JPEG, PNG or WebP file" in capsys.readouterr().err
    assert list((source / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-shard", "0"], "samples-per-shard must be >= 1, got 0"),
        (["--image-size", "-1"], "image-size must be >= 1, got -1"),
        (["--names", str(REPOSITORY / "README.md")], "must be Unicode's emoji-test.txt, got a file without such lines"),
        (["--images", "nowhere"], "'nowhere' must hold the pictures of noto-emoji, got none that is named"),
    ],
)
def test_bad_input_gets_one_sentence(
    script: ModuleType, source: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make(script, source, *options)
    assert message in capsys.readouterr().err
    assert not (source / "out").exists()
