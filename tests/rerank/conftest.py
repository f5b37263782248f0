"""Models in the format of transformers, made once; nothing here may touch the network."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hf_models import KINDS, save_model
from PIL import Image

from dalle1.rerank import hf_files
from dalle1.rerank.hf_clip import HFCLIPReranker


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a test must not touch the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a model by its kind; not to be changed."""
    from transformers.utils import logging as library

    verbosity = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save_model(root / kind, kind)
    library.set_verbosity(verbosity)
    library.enable_progress_bar()
    return lambda kind: root / kind


@pytest.fixture(scope="session")
def rerankers(models: Callable[[str], Path]) -> dict[str, HFCLIPReranker]:
    return {kind: HFCLIPReranker.load(models(kind)) for kind in KINDS}


@pytest.fixture
def copy(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes a directory of a model that a test may damage."""

    def make(kind: str) -> Path:
        return Path(shutil.copytree(models(kind), tmp_path / "copies" / kind))

    return make


@pytest.fixture
def across_then_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's order of the passes, in all versions; since 13 it takes the other one for some tall pictures."""
    resize = Image.Image.resize

    def resize_twice(self: Image.Image, size: tuple[int, int], resample: int, **_: object) -> Image.Image:
        return resize(resize(self, (size[0], self.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", resize_twice)


@pytest.fixture
def quiet_library() -> Iterator[None]:
    """What tests themselves call of the library says things of no interest."""
    with hf_files.quiet_transformers():
        yield
