"""Tiny networks with Inception's interface, and DINOv2, as files."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn


class TinyInception(nn.Module):
    """Features of 299 x 299 pictures: colours of a 2 x 2 grid; classes from them."""

    def __init__(self, as_logits: bool) -> None:
        super().__init__()
        self.as_logits = as_logits
        self.classes = nn.Linear(12, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        assert img.shape[2] == 299 and img.shape[3] == 299  # noqa: PT018  (TorchScript has no chains)
        features = nn.functional.adaptive_avg_pool2d(img.float() / 255, [2, 2]).flatten(1)
        if return_features:
            return features
        logits = features @ self.classes.weight.t()
        if not no_output_bias:
            logits = logits + self.classes.bias
        if self.as_logits:
            return logits
        return logits.softmax(dim=1)


class NoInception(nn.Module):
    """Takes pictures and nothing else."""

    def forward(self, img: Tensor) -> Tensor:
        return img.float().mean(dim=[2, 3])


def script(network: nn.Module, path: Path) -> Path:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(path))  # type: ignore[no-untyped-call]
    return path


@pytest.fixture(scope="session")
def inception_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`probabilities`, `logits` and `other`, which is none."""
    root = tmp_path_factory.mktemp("inception")
    return {
        "probabilities": script(TinyInception(as_logits=False), root / "probabilities.pt"),
        "logits": script(TinyInception(as_logits=True), root / "logits.pt"),
        "other": script(NoInception(), root / "other.pt"),
    }


@pytest.fixture(scope="session")
def write_pictures() -> Callable[..., Path]:
    """Writes a folder of pictures of random colours with captions beside them; nowhere square."""

    def write(folder: Path, count: int, *, size: tuple[int, int] = (20, 14), seed: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        numbers = np.random.default_rng(seed)
        for i in range(count):
            coarse = numbers.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(folder / f"{i:03d}.png")
            (folder / f"{i:03d}.txt").write_text(f"{('a red circle', 'a blue square')[i % 2]} {i}")
        return folder

    return write


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
