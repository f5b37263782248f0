"""Evaluations that torchrun's processes share give, bit for bit, what one process gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import environment

from dalle1.data.shapes_shards import ShapesRecipe, write_shapes
from dalle1.evaluation.chunks import CHUNK_SIZE

pytestmark = pytest.mark.slow
ONE = (sys.executable,)
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for three chunks of each set."""
    directory = tmp_path_factory.mktemp("data") / "shapes"
    n = 2 * CHUNK_SIZE + 50
    write_shapes(
        ShapesRecipe(directory=str(directory), train_samples=n, val_samples=n, test_samples=1, image_size=16),
        n_processes=1,
    )
    return directory


def _evaluate(launcher: tuple[str, ...], out: Path, *arguments: str) -> dict[str, Any]:
    command = [*launcher, "-m", "dalle1.evaluate", *arguments, f"out={out}", f"cache={out}-cache", "device=cpu"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers: dict[str, Any] = json.loads((out / "evaluation.json").read_text())["numbers"]
    return numbers


def test_transformer(shards: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    models = [f"{name}={checkpoints[name]}" for name in ("transformer", "dvae")]
    arguments = ("transformer", f"{shards}/val-*.tar", *models, "truncate_captions=true")
    assert _evaluate(TWO, tmp_path / "two", *arguments) == _evaluate(ONE, tmp_path / "one", *arguments)


def test_overlap(shards: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sets = [f"{name}={shards}/{name}-*.tar" for name in ("train", "val")]
    arguments = ("overlap", *sets, f"extractor=clip:{checkpoints['clip']}", "pairs=3")
    assert _evaluate(TWO, tmp_path / "two", *arguments) == _evaluate(ONE, tmp_path / "one", *arguments)
    pairs = [json.loads((tmp_path / name / "overlap.json").read_text())["pairs"] for name in ("one", "two")]
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == 2 * CHUNK_SIZE + 50
