"""Small pictures and tar shards, built on the fly."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
MakeSamples = Callable[..., Members]


def _encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str], ModuleType]:
    """Loads a script of the folder `data/` by its name."""
    return _load_recipe


def _load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "data" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """A PIL picture as the bytes of a file."""
    return _encode


@pytest.fixture
def write_shard(tmp_path: Path) -> WriteShard:
    """Writes a tar file with these members and returns its path."""

    def write(name: str, members: Members) -> str:
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return str(path)

    return write


@pytest.fixture
def make_samples() -> MakeSamples:
    """Members of n good samples; sample i is a plain 12 x 8 picture of grey level i with caption "number i"."""

    def make(n_samples: int, start: int = 0) -> Members:
        members = []
        for i in range(start, start + n_samples):
            members.append((f"{i:06d}.png", _encode(Image.new("RGB", (12, 8), (i, i, i)))))
            members.append((f"{i:06d}.txt", f"number {i}".encode()))
            members.append((f"{i:06d}.json", b'{"number": %d}' % i))
        return members

    return make
