"""One device, several, or accumulated batches: with the same global batch they learn the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from equal_runs import STAGES, UPDATES, train_all
from launching import environment

from dalle1.evaluation.pictures import read_curves

# In fp32; other batches add up in another order.
TOLERANCE = 1e-5
FILE = Path(__file__).with_name("equal_runs.py")


@pytest.fixture(scope="module")
def alone(trained: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one device."""
    directory = tmp_path_factory.mktemp("alone")
    link_earlier(trained, directory)
    train_all(directory, shapes, f"dvae={trained}/dvae/checkpoints/last.ckpt")
    return directory


def link_earlier(trained: Path, directory: Path) -> None:
    """What the stages need: a text tokenizer, and a dVAE that is not the one that is compared."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer").symlink_to(trained / "tokenizer")


def torchrun(n: int, directory: Path, trained: Path, shapes: Path) -> None:
    link_earlier(trained, directory)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", str(FILE)]
    command = [*launcher, str(directory), str(shapes), f"dvae={trained}/dvae/checkpoints/last.ckpt"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def assert_same(results: Path, alone: Path, stages: tuple[str, ...] = tuple(STAGES)) -> None:
    for stage in stages:
        ours, expected = read_curves(results / stage), read_curves(alone / stage)
        assert len(expected["train/loss"]) == UPDATES
        names = [name for name in expected if name.split("/")[0] in ("train", "val")]
        assert set(ours) == set(expected)
        for name in names:
            assert [step for step, _ in ours[name]] == [step for step, _ in expected[name]]
            of_ours, of_expected = ([value for _, value in curves[name]] for curves in (ours, expected))
            # Losses as asked for; accuracies may differ by a token where two are equally likely.
            assert of_ours == pytest.approx(of_expected, rel=TOLERANCE if "loss" in name else 1e-3), (stage, name)


def test_two_ranks_learn_what_one_does(alone: Path, trained: Path, shapes: Path, tmp_path: Path) -> None:
    torchrun(2, tmp_path / "two", trained, shapes)
    assert_same(tmp_path / "two", alone)


def test_accumulated_batches_teach_what_one_large_one_does(
    alone: Path, trained: Path, shapes: Path, tmp_path: Path
) -> None:
    # Not CLIP: its loss compares the samples of one batch with each other.
    stages = ("dvae", "transformer")
    link_earlier(trained, tmp_path / "parts")
    options = ("+trainer.accumulate_grad_batches=2", f"dvae={trained}/dvae/checkpoints/last.ckpt")
    train_all(tmp_path / "parts", shapes, *options, parts=2, stages=stages)
    assert_same(tmp_path / "parts", alone, stages)


@pytest.mark.slow
def test_four_ranks_learn_what_one_does(alone: Path, trained: Path, shapes: Path, tmp_path: Path) -> None:
    torchrun(4, tmp_path / "four", trained, shapes)
    assert_same(tmp_path / "four", alone)
