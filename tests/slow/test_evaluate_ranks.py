"""`torchrun -m dalle1.evaluate`: two processes give the numbers of one, to the last digit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import environment
from PIL import Image

pytestmark = pytest.mark.slow


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(count):
        coarse = numbers.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20, 14), Image.Resampling.NEAREST).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"{('a red circle', 'a blue square')[i % 2]} {i}")
    return folder


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What a command writes, by `processes` of them."""

    def call(processes: int, *arguments: str) -> dict[str, Any]:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        out = f"out-{processes}"
        command = [sys.executable, *(launcher if processes > 1 else ()), "-m", "dalle1.evaluate", *arguments]
        shown = subprocess.run(
            [*command, f"out={out}", f"cache=cache-{processes}"],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.count("numbers: ") == 1  # one speaks
        content: dict[str, Any] = json.loads((tmp_path / out / "evaluation.json").read_text())
        return content

    return call


def test_system_is_sampled_and_measured_by_two_processes_as_by_one(
    evaluate: Callable[..., dict[str, Any]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "reference", 300)  # two chunks
    models = [f"transformer={checkpoints['transformer']}", f"dvae={checkpoints['dvae']}"]
    models += [f"reranker=clip:{checkpoints['clip']}", f"extractor=clip:{checkpoints['clip']}"]
    one, two = (
        evaluate(
            n, "system", str(folder), *models, "candidates=2", "best_of=1,2", "blur=0,2", f"sample_dir=samples-{n}"
        )
        for n in (1, 2)
    )
    assert one["numbers"] == two["numbers"]
    assert one["best_of"] == two["best_of"]
    pictures = [{path.name: path.read_bytes() for path in tmp_path.glob(f"samples-{n}/0*.png")} for n in (1, 2)]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) >= 300


def test_tokenizer_is_measured_by_two_processes_as_by_one(
    evaluate: Callable[..., dict[str, Any]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "pictures", 300)
    models = [f"dvae={checkpoints['dvae']}", f"extractor=clip:{checkpoints['clip']}"]
    one, two = (evaluate(n, "tokenizer", str(folder), *models) for n in (1, 2))
    assert one["numbers"] == two["numbers"]
    for path in tmp_path.glob("cache-1/*/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cache-2" / path.relative_to(tmp_path / "cache-1")).read_bytes()
