"""The commands of docs/tutorial.md work word for word, one after the other, on few pictures with toy networks."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from served_pictures import REPOSITORY

from dalle1.data.shapes_shards import ShapesRecipe, write_shapes

pytestmark = pytest.mark.slow

PAGE = REPOSITORY / "docs" / "tutorial.md"
# Options that a toy adds to a command that begins so; the page's own come before.
TOYS = {
    "train.py stage=tokenizer": "text_vocab_size=300 text_seq_len=64",
    "train.py stage=dvae": "model.n_hid=16 model.n_init=16 optim.max_steps=12 optim.codebook_start_step=6 "
    "optim.warmup_steps=1 optim.codebook_start_pictures=8",
    "train.py stage=clip": "text_vocab_size=300 text_seq_len=64 model.image_width=16 model.text_width=16 "
    "optim.max_steps=4 optim.warmup_steps=1 optim.batch_size=8",
    "train.py stage=transformer": "text_vocab_size=300 text_seq_len=64 model.d_model=16 model.n_layers=2 "
    "optim.max_steps=4 optim.warmup_steps=1",
}


def commands() -> str:
    """All blocks of the page that are for a shell, as one script."""
    return "".join(re.findall(r"^```sh\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory with the project's scripts, and scenes in the place of emoji, whose font may not be there."""
    for name in ("train.py", "sample.py", "conf"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "data").mkdir()
    recipe = ShapesRecipe(
        directory=str(tmp_path / "data" / "emoji"), train_samples=40, val_samples=40, test_samples=1, image_size=64
    )
    write_shapes(recipe, n_processes=1)
    for shard in (tmp_path / "data" / "emoji").glob("*.tar"):
        _rename_pictures(shard)
    return tmp_path


def _rename_pictures(shard: Path) -> None:
    """Name the scenes, PNG, as the emoji, JPEG, are named: what a picture is, its content says."""
    unpacked = shard.with_suffix("")
    shutil.unpack_archive(shard, unpacked, filter="data")
    for path in unpacked.glob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    shard.unlink()
    subprocess.run(["tar", "cf", shard, "--sort=name", "-C", unpacked, "."], check=True)
    shutil.rmtree(unpacked)


def write_python(directory: Path) -> None:
    """A `python` that adds the toys' options, and leaves out what has been made already."""
    cases = [f'"{begin}"*) set -- "$@" {options};;' for begin, options in TOYS.items()]
    path = directory / "python"
    path.write_text(
        "\n".join(
            [
                "#!/bin/bash",
                'case "$*" in',
                '"data/make_emoji.py") exit;;',
                *cases,
                "esac",
                f'exec {sys.executable} "$@"',
            ]
        )
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_every_command_of_the_tutorial_works(checkout: Path) -> None:
    script = commands()
    assert script.count("python ") == 17
    (checkout / "bin").mkdir()
    write_python(checkout / "bin")
    environment = os.environ | {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY / "src"),
        "DALLE1_CACHE_DIR": str(checkout / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for path in (
        "runs/inspect/mine/samples.png",
        "runs/mine/dvae/curves.png",
        "runs/mine/dvae/pictures/reconstructions-step0000012.png",
        "runs/mine/transformer/pictures/samples-step0000004.png",
        "runs/mine/clip/checkpoints/best.ckpt",
        "runs/mine/reconstructed/metrics.csv",
        "from-exported/grid.png",
    ):
        assert (checkout / path).is_file(), path
    assert len(list((checkout / "runs" / "evaluations").glob("*/evaluation.json"))) == 2
    assert len(list((checkout / "runs" / "mine" / "samples").glob("*/index.html"))) == 3
