"""The recipe of the photographs, on an archive of the same layout made here."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from dalle1.data.dataset import PairDataset
from dalle1.data.preparation import Preparation
from dalle1.data.shards import ShardIndex


@pytest.fixture(scope="module")
def script(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    """The script as a module."""
    return load_recipe("make_photos")


def archive(path: Path, names: list[str]) -> Path:
    """An archive of red pictures 12x8 under these names."""
    file = io.BytesIO()
    Image.new("RGB", (12, 8), "red").save(file, "jpeg")
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    return path


def test_shards_hold_the_photographs_of_their_split(script: ModuleType, tmp_path: Path) -> None:
    images = "BSR/BSDS500/data/images"
    names = [f"{images}/train/2.jpg", f"{images}/train/1.jpg", f"{images}/val/3.jpg", f"{images}/test/4.jpg"]
    script.main(["--archive", str(archive(tmp_path / "a.tgz", names)), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train-00000.tar", "val-00000.tar"]
    train, val = (ShardIndex(str(tmp_path / "out" / f"{split}-00000.tar")) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 1)
    assert train[0].metadata()["width"] == 12
    red = PairDataset(train, Preparation(image_size=8))[0]["pixels"].float().mean((1, 2)).tolist()
    assert red == pytest.approx([255, 0, 0], abs=2)


def _missing(path: Path) -> None: ...


def _text(path: Path) -> None:
    path.write_text("<html>")


def _other(path: Path) -> None:
    archive(path, ["pictures/1.jpg"])


def _cut_short(path: Path) -> None:
    content = archive(path, ["images/train/1.jpg", "images/val/2.jpg"]).read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_missing, "No such file"),
        (_text, "must be the data set's .tgz, but cannot be read"),
        (_cut_short, "must be the data set's .tgz, but cannot be read"),
        (_other, "must have pictures in images/train and images/val, got another archive"),
    ],
)
def test_bad_archive_gets_one_sentence_and_leaves_no_shard(
    script: ModuleType,
    tmp_path: Path,
    make: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "a.tgz")
    with pytest.raises(SystemExit):
        script.main(["--archive", str(tmp_path / "a.tgz"), "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
