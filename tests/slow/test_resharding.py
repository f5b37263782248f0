"""Sharded training on changing numbers of devices, and in all its ways to compute: `make test-slow`, some minutes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from launching import call

from dalle1.sharded_files import is_sharded

pytestmark = pytest.mark.slow

TINY = (
    *("image_size=16", "grid_size=2", "image_vocab_size=16", "text_vocab_size=300", "text_seq_len=64"),
    *("data.recipe.image_size=16", "data.recipe.train_samples=24", "data.recipe.val_samples=4"),
    *("data.recipe.test_samples=4", "trainer.log_every_n_steps=1", "trainer.val_check_interval=1"),
)
DVAE = ("model.patch_size=8", "model.n_hid=16", "model.n_init=16", "optim.codebook_start_step=0")
# Widths that four devices cannot share evenly. With a small eps Adam makes as much of a gradient's rounding error as of
# a gradient; with a constant rate a run may be made longer.
TRANSFORMER = (
    *("stage=transformer", "model.d_model=18", "model.n_heads=3", "optim.eps=1e-2", "optim.caption_dropout=0"),
    *("optim.lr=2e-3", "optim.final_lr=2e-3", "optim.warmup_steps=1", "~callbacks.pictures"),
)


def script(directory: Path, *arguments: str) -> None:
    """`train.py`, with tiny networks."""
    done = call(directory, *arguments, *TINY, "trainer.accelerator=cpu")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where there are a text tokenizer and a dVAE."""
    directory = tmp_path_factory.mktemp("stages")
    script(directory, "stage=tokenizer")
    script(directory, "stage=dvae", *DVAE, "optim.max_steps=2", "optim.batch_size=4", "optim.warmup_steps=1")
    return directory


def train(directory: Path, run: str, devices: int, max_steps: int, *options: str) -> None:
    """Train with four samples in an update."""
    sizes = (f"trainer.devices={devices}", f"optim.batch_size={4 // devices}", f"optim.max_steps={max_steps}")
    script(directory, *TRANSFORMER, *sizes, f"run_dir={directory / run}", *options)


def losses(directory: Path, run: str) -> list[float]:
    """Of all validations of all starts, of which there is one after each update and one at the end."""
    values: list[float] = []
    for path in sorted((directory / run).glob("logs/*/metrics.csv"), key=lambda path: path.parent.name):
        with path.open() as file:
            values += [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]][:-1]
    return values


def test_run_goes_on_with_any_number_of_devices_and_without_sharding(directory: Path) -> None:
    train(directory, "one", 1, 20)
    last = directory / "changing" / "checkpoints" / "last.ckpt"
    for devices, max_steps, way in ((4, 5, "fsdp"), (2, 10, "fsdp"), (1, 13, "auto"), (2, 16, "fsdp"), (1, 20, "fsdp")):
        train(directory, "changing", devices, max_steps, f"trainer={way}")
        assert is_sharded(last) == (way == "fsdp")
    assert len(losses(directory, "one")) == 20
    assert losses(directory, "changing") == pytest.approx(losses(directory, "one"), rel=1e-5)


def test_losses_are_those_of_ddp(directory: Path) -> None:
    for way in ("ddp", "fsdp"):
        train(directory, way, 2, 20, f"trainer={way}")
    assert len(losses(directory, "ddp")) == 20
    assert losses(directory, "fsdp") == pytest.approx(losses(directory, "ddp"), rel=1e-5)


def test_mixed_precision_is_as_near_to_ddp_as_that_to_full_precision(directory: Path) -> None:
    for name, way, precision in (
        ("full", "ddp", "32-true"),
        ("mixed", "ddp", "bf16-mixed"),
        ("both", "fsdp", "bf16-mixed"),
    ):
        train(directory, name, 2, 8, f"trainer={way}", f"trainer.precision={precision}")
    # bf16 has 8 bits: gains of norms, which travel with their block, are rounded as the other factors are.
    assert losses(directory, "both") == pytest.approx(losses(directory, "mixed"), rel=2e-3)
    assert losses(directory, "mixed") == pytest.approx(losses(directory, "full"), rel=2e-3)


def test_compiled_blocks_and_checkpointing_change_nothing(directory: Path) -> None:
    for name, options in (
        ("eager", ()),
        ("compiled", ("compute.compile=true", "compute.activation_checkpointing=true")),
    ):
        train(directory, name, 2, 3, "trainer=fsdp", *options)
    assert losses(directory, "compiled") == pytest.approx(losses(directory, "eager"), rel=1e-5)
