"""Tiny networks with Inception's interface as files, pictures, and commands that are called as on a command line."""

from __future__ import annotations

import json
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dalle1.evaluate import main

Run = Callable[..., dict[str, Any]]


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


class ResizingInception(TinyInception):
    """Takes pictures of any size and resizes them as TensorFlow 1 did: not antialiased, towards the upper left."""

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        theta = torch.eye(2, 3)
        theta[0, 2] += 1 / img.shape[3] - 1 / 299
        theta[1, 2] += 1 / img.shape[2] - 1 / 299
        grid = nn.functional.affine_grid(
            theta[None].expand(img.shape[0], 2, 3), [img.shape[0], 3, 299, 299], align_corners=False
        )
        resized = nn.functional.grid_sample(
            img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        features = nn.functional.adaptive_avg_pool2d(resized / 255, [2, 2]).flatten(1)
        if return_features:
            return features
        return (features @ self.classes.weight.t()).softmax(dim=1)


class ConvolutionalInception(TinyInception):
    """Takes pictures of any size because its convolution does, without resizing them."""

    def __init__(self) -> None:
        super().__init__(as_logits=False)
        self.convolution = nn.Conv2d(3, 12, 5, padding=2)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        features = self.convolution(img.float() / 255).mean(dim=[2, 3])
        if return_features:
            return features
        return (features @ self.classes.weight.t()).softmax(dim=1)


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
    """`probabilities` and `logits` take 299 x 299 pixels; `resizing`, `convolutional`; and `other`, which is none."""
    root = tmp_path_factory.mktemp("inception")
    return {
        "probabilities": script(TinyInception(as_logits=False), root / "probabilities.pt"),
        "logits": script(TinyInception(as_logits=True), root / "logits.pt"),
        "resizing": script(ResizingInception(as_logits=False), root / "resizing.pt"),
        "convolutional": script(ConvolutionalInception(), root / "convolutional.pt"),
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


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls a command in `tmp_path`; returns what it writes to `evaluation.json`, or what it says if it fails."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, out: str = "result", code: int = 0) -> dict[str, Any]:
        words = [*map(str, arguments), f"out={out}", "device=cpu"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *words])
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code == code
            error = capsys.readouterr().err
            assert not Path(out).exists()
            return {"error": error}
        main()
        return json.loads((tmp_path / out / "evaluation.json").read_text()) | {"printed": capsys.readouterr().out}

    return call


@pytest.fixture
def system(run: Run, checkpoints: dict[str, Path], inception_files: dict[str, Path]) -> Run:
    """`evaluate system` with the tiny models."""

    def call(*arguments: object, samples: bool = False, **options: Any) -> dict[str, Any]:
        models = [] if samples else [f"{name}={checkpoints[name]}" for name in ("transformer", "dvae")]
        extractors = [
            f"extractor=inception:{inception_files['probabilities']}",
            f"extractor=clip:{checkpoints['clip']}",
        ]
        return run("system", *arguments, *models, *extractors, **options)

    return call
