"""A tiny data set, and training stages on it from the real configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from launching import call
from stage_runs import Train, TrainScript

from dalle1.data.shapes_shards import ShapesRecipe, write_shapes
from dalle1.training.run import run

CONF = Path(__file__).parents[2] / "conf"
TINY = {
    "common": [
        "image_size=16",
        "grid_size=4",
        "image_vocab_size=16",
        "text_vocab_size=300",
        "text_seq_len=64",
        "callbacks.checkpoint.every_n_steps=4",
        "trainer.val_check_interval=4",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
    ],
    "tokenizer": [],
    "dvae": [
        *("model.patch_size=4", "model.n_hid=16", "model.n_init=16"),
        *("optim.max_steps=8", "optim.warmup_steps=1", "optim.batch_size=4"),
        *("optim.codebook_start_step=3", "optim.codebook_start_pictures=16", "optim.temperature_steps=6"),
    ],
    "tokens": [],
    "clip": [
        *("model.image_width=16", "model.image_layers=1", "model.text_width=16", "model.text_layers=1"),
        *("model.patch_size=8", "optim.max_steps=8", "optim.warmup_steps=1", "optim.batch_size=4"),
    ],
    "transformer": [
        # Every pattern, on a grid on which they hide something.
        *("model.d_model=16", "model.n_layers=3", "model.n_heads=2", "model.conv_kernel_size=3"),
        *("optim.bpe_dropout=0.1", "compute.attention_backend=local"),
        *("optim.max_steps=8", "optim.warmup_steps=1", "optim.batch_size=4"),
    ],
}


@pytest.fixture(scope="session")
def optim_numbers() -> dict[str, Any]:
    """What every optimizer configuration must be told, for modules that are tested without a trainer."""
    return {
        "batch_size": 4,
        "max_steps": 10,
        "lr": 1e-3,
        "final_lr": 0.0,
        "warmup_steps": 1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "grad_clip_norm": 1.0,
        "ema_decay": 0.0,
    }


@pytest.fixture(autouse=True)
def _denormal_numbers_come_back() -> Iterator[None]:
    # Training does without them, for the rest of the process; tests of other things may need them.
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Bit-exact comparisons and tiny sizes: threads would only add noise and time.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 40 training, 8 validation and 8 test scenes of 16 x 16 pixels."""
    directory = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(
        ShapesRecipe(directory=str(directory), train_samples=40, val_samples=8, test_samples=8, image_size=16),
        n_processes=1,
    )
    return directory


def _options(shapes: Path, results: Path, stage: str, more: Sequence[str]) -> list[str]:
    """All options of a stage at toy size."""
    return [
        f"stage={stage}",
        *TINY["common"],
        *TINY[stage],
        "name=test",
        f"results_dir={results}",
        f"run_dir={results / stage}",
        "data.recipe=null",
        f"data.train={shapes}/train-*.tar",
        f"data.val={shapes}/val-*.tar",
        *more,
    ]


@pytest.fixture(scope="session")
def train(shapes: Path) -> Train:
    """Runs a stage at toy size: `train(results_dir, "dvae", "optim.max_steps=4")` returns its summary."""

    def train(results: Path, stage: str, *overrides: str) -> dict[str, Any]:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=_options(shapes, results, stage, overrides))
        return run(cfg)

    return train


@pytest.fixture(scope="session")
def train_script(shapes: Path) -> TrainScript:
    """The same through `train.py`, which may start several processes; returns what it prints."""

    def train_script(results: Path, stage: str, *overrides: str) -> str:
        done = call(results, *_options(shapes, results, stage, overrides))
        assert done.returncode == 0, done.stderr
        return done.stdout

    return train_script


@pytest.fixture(scope="session")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all four stages, trained for 8 steps; tests must not change them."""
    results = tmp_path_factory.mktemp("results")
    for stage in ("tokenizer", "dvae", "clip", "transformer"):
        train(results, stage)
    return results
