"""Write the generated data set (see `shapes`) as tar shards: the same recipe always gives the same bytes.

The shards and their `recipe.json` are made in a temporary directory beside the wanted one, which is renamed
when all is done: a directory that exists is complete and says how it was made.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dalle1.data.fields import require_int
from dalle1.data.processes import n_usable_cores
from dalle1.data.shapes import SceneMix, draw, make_sample
from dalle1.data.shard_writer import EncodedPicture, write_shard

SPLITS = ("train", "val", "test")
MANIFEST = "recipe.json"
# About as many pictures are drawn in the time that another process needs to start.
_SAMPLES_WORTH_A_PROCESS = 5_000


@dataclass(frozen=True, kw_only=True)
class ShapesRecipe:
    """All that decides the generated data set; each split is drawn from a seed of its own."""

    directory: str  # where the shards go; made by the recipe
    train_samples: int = 20_000  # scenes, as of the other splits
    val_samples: int = 1_000  # drawn as the training split is
    test_samples: int = 1_000  # each with a held-out colour-shape pair, which the other splits never show
    image_size: int = 64  # side in pixels, >= 16
    seed: int = 0  # >= 0
    mix: SceneMix = field(default_factory=SceneMix)
    samples_per_shard: int = 1_000

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type (TypeError) or outside their range (ValueError)."""
        if not isinstance(self.directory, str) or not self.directory:
            raise TypeError(f"directory must be a path in a string, got {self.directory!r}")
        for name in ("train_samples", "val_samples", "test_samples", "samples_per_shard"):
            require_int(name, getattr(self, name), at_least=1)
        require_int("image_size", self.image_size, at_least=16)
        require_int("seed", self.seed, at_least=0)
        if not isinstance(self.mix, SceneMix):
            raise TypeError(f"mix must be a SceneMix, got {self.mix!r}")

    def settings(self) -> dict[str, Any]:
        """The recipe but for its directory, in plain JSON types: the content of `recipe.json`."""
        return {name: value for name, value in asdict(self).items() if name != "directory"}

    def ensure(self) -> None:
        """Make the shards, unless their directory already holds exactly these.

        Raises: FileExistsError if the directory was made otherwise, which is never changed; FileNotFoundError
            if shards are missing in it.
        """
        directory = Path(self.directory)
        if not directory.exists():
            try:
                write_shapes(self)
                return
            except OSError:
                # Another process, which was started together with this one, has made it first.
                if not directory.exists():
                    raise
        manifest = directory / MANIFEST
        if not manifest.is_file():
            raise FileExistsError(f"directory {self.directory!r} has no {MANIFEST}; choose another directory")
        made, wanted = json.loads(manifest.read_text()), self.settings()
        changes = [f"{name} {made.get(name)}, not {wanted[name]}" for name in wanted if made.get(name) != wanted[name]]
        if changes:
            raise FileExistsError(
                f"directory {self.directory!r} was made with other settings: {'; '.join(changes)}; "
                "delete it or choose another one, data.recipe.directory=..."
            )
        for name, _, _ in _shards(self):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"directory {self.directory!r} lacks {name}; delete it to have it made again")


def write_shapes(recipe: ShapesRecipe, *, n_processes: int | None = None) -> None:
    """Write `train-00000.tar`, ..., `val-...`, `test-...` and `recipe.json` into the recipe's directory.

    An interrupted call leaves nothing behind. Without `n_processes`, as many are used as the work is worth.

    Raises: FileExistsError if the directory exists.
    """
    directory = Path(recipe.directory)
    if directory.exists():
        raise FileExistsError(f"directory {recipe.directory!r} exists; delete it or choose another directory")
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        _write_shards(recipe, temporary, n_processes)
        (temporary / MANIFEST).write_text(json.dumps(recipe.settings(), indent=2) + "\n")
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _shards(recipe: ShapesRecipe) -> list[tuple[str, str, range]]:
    """File name, split and sample numbers of every shard."""
    shards = []
    for split in SPLITS:
        n_samples = getattr(recipe, f"{split}_samples")
        for number, start in enumerate(range(0, n_samples, recipe.samples_per_shard)):
            samples = range(start, min(start + recipe.samples_per_shard, n_samples))
            shards.append((f"{split}-{number:05d}.tar", split, samples))
    return shards


def _write_shards(recipe: ShapesRecipe, directory: Path, n_processes: int | None) -> None:
    shards = _shards(recipe)
    n_samples = sum(len(samples) for _, _, samples in shards)
    if n_processes is None:
        n_processes = min(n_usable_cores(), max(1, n_samples // _SAMPLES_WORTH_A_PROCESS))
    write = partial(_write_shard, recipe, directory)
    with tqdm(total=n_samples, desc="drawing shapes", unit="picture", disable=None) as bar:
        if n_processes == 1:
            _advance(bar, map(write, shards))
            return
        # Not fork: the caller may have started threads, whose locks a forked child could inherit taken.
        with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
            _advance(bar, pool.map(write, shards))


def _advance(bar: tqdm[Any], written: Iterable[int]) -> None:
    for n_samples in written:
        bar.update(n_samples)


def _write_shard(recipe: ShapesRecipe, directory: Path, shard: tuple[str, str, range]) -> int:
    """Draw one shard and return its number of samples."""
    name, split, samples = shard
    drawn = (_draw_sample(recipe, split, index) for index in samples)
    return write_shard(directory / name, drawn, first=samples.start)


def _draw_sample(recipe: ShapesRecipe, split: str, index: int) -> EncodedPicture:
    # Different for any two (seed, split).
    seed = recipe.seed * len(SPLITS) + SPLITS.index(split)
    sample = make_sample(seed, index, recipe.mix, held_out=split == "test")
    picture = io.BytesIO()
    Image.fromarray(draw(sample.scene, recipe.image_size)).save(picture, "png")
    return EncodedPicture(
        extension="png",
        data=picture.getvalue(),
        width=recipe.image_size,
        height=recipe.image_size,
        caption=sample.caption,
        metadata={"scene": sample.scene.to_dict()},
    )
