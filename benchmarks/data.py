"""Training pictures read by one process with one thread, against WebDataset and Pillow: `make bench-data`.

From JPEG files in tar shards to batches of 32 squares of 256 x 256 pixels by the paper's two augmentations. All sides
draw the same kind of crops and read the captions too; nothing is shuffled. Sides:

    ours      what `PairDataset` makes its samples of: `ShardIndex` and `Preparation`; batches are uint8, and become
              floats on the device
    theirs    WebDataset as its documentation shows it: `decode("pilrgb")`, the same steps with Pillow (crop, resize by
              BOX, crop, flip), and float32 from 0 to 1, which is what `ToTensor` of torchvision gives
    uint8     theirs without the last step

The pictures are drawn: noise of all wavelengths, the longer the stronger, which takes about as many bytes as
photographs (512 x 512 pixels at qualities from 90 to 95: 80 kB). `--pictures` takes others, scaled to the same sizes.

Sides take turns; what counts is the time that the processor works for a side, its median over the rounds, and the
median of the ratios in one round. glibc is told to keep freed memory, as in training.

Then how fast image tokens are read instead, and what a training step saves by them (`data_tokens`).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Literal

import numpy as np
import torch
import webdataset
from data_tokens import measure_reading, measure_step
from measure import Rows, in_own_process, machine, print_tables, write_report
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle1.cli import errors_in_one_line
from dalle1.data.augmentation import draw_dvae, draw_transformer
from dalle1.data.fields import require_int
from dalle1.data.preparation import Preparation
from dalle1.data.shards import ShardIndex
from dalle1.training.allocator import keep_freed_memory

PaperAugmentation = Literal["dvae", "transformer"]
IMAGE_SIZE, BATCH_SIZE = 256, 32
# Width and height of the pictures -> how many batches of them: as data sets are often stored, and as photographs are
# shown on a screen.
SIZES = {(512, 512): 2, (1024, 768): 1}
AUGMENTATIONS: tuple[PaperAugmentation, ...] = ("dvae", "transformer")


def drawn_pictures(width: int, height: int) -> Iterator[Image.Image]:
    """Pictures of that size that are as hard to decode as photographs, without an end."""
    rng = np.random.default_rng(0)
    while True:
        total = np.full((height, width, 3), 127.5)
        for cells in (2, 4, 8, 16, 32, 64, 128, 256):
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            detail = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 127.5
            # Brightness differs more than colour.
            total += (0.3 * detail + 0.7 * detail.mean(axis=2, keepdims=True)) * 1.3 / cells**0.4
        yield Image.fromarray(total.clip(0, 255).astype(np.uint8))


def given_pictures(pattern: str, width: int, height: int) -> Iterator[Image.Image]:
    """The JPEGs in tar files, scaled to that size, again and again."""
    index = ShardIndex(pattern)
    for i in itertools.cycle(range(len(index))):
        with Image.open(io.BytesIO(index[i].image())) as picture:
            yield picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def write_shard(path: Path, pictures: Iterator[Image.Image], n_samples: int) -> None:
    """A shard as img2dataset writes it: pictures, captions, and what is known of them."""
    with tarfile.open(path, "w") as shard:
        for i, picture in enumerate(itertools.islice(pictures, n_samples)):
            jpeg = io.BytesIO()
            picture.save(jpeg, "JPEG", quality=90 + i % 6)
            caption = "a picture of something"
            facts = {"caption": caption, "url": f"https://example.org/{i}.jpg", "width": picture.width}
            contents = {"jpg": jpeg.getvalue(), "txt": caption.encode(), "json": json.dumps(facts).encode()}
            for extension, content in contents.items():
                member = tarfile.TarInfo(f"{i:06d}.{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def make_ours(shard: str, augmentation: PaperAugmentation) -> Callable[[], None]:
    """A step that reads all of a shard as `PairDataset` does."""
    index = ShardIndex(shard)
    preparation = Preparation(image_size=IMAGE_SIZE, augmentation=augmentation)

    def step() -> None:
        for first in range(0, len(index), BATCH_SIZE):
            samples = [(i, index[i]) for i in range(first, first + BATCH_SIZE)]
            captions = [sample.text() for _, sample in samples]
            pixels = torch.stack([preparation.pixels(sample, i, draw=0) for i, sample in samples])
            assert pixels.shape == (len(captions), 3, IMAGE_SIZE, IMAGE_SIZE)

    return step


def make_theirs(shard: str, augmentation: PaperAugmentation, *, as_floats: bool) -> Callable[[], None]:
    """A step that reads all of a shard with WebDataset and Pillow."""
    rng = Random(0)
    draw = {"dvae": draw_dvae, "transformer": draw_transformer}[augmentation]

    def augment(picture: Image.Image) -> Tensor:
        crop = draw(rng, *picture.size, IMAGE_SIZE)
        side = min(picture.size)
        picture = picture.crop((crop.left, crop.top, crop.left + side, crop.top + side))
        picture = picture.resize((crop.resized_side, crop.resized_side), Image.Resampling.BOX)
        left, top = crop.inner_left, crop.inner_top
        picture = picture.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
        if crop.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255) if as_floats else pixels

    samples = (
        webdataset.WebDataset(shard, shardshuffle=False, empty_check=False).decode("pilrgb").to_tuple("jpg", "txt")
    )
    batches = iter(samples.map_tuple(augment, str).repeat().batched(BATCH_SIZE))
    n_batches = len(ShardIndex(shard)) // BATCH_SIZE

    def step() -> None:
        for pixels, captions in itertools.islice(batches, n_batches):
            assert pixels.shape == (len(captions), 3, IMAGE_SIZE, IMAGE_SIZE)

    return step


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int, title: str) -> dict[str, list[float]]:
    """Processor seconds of each side's step in every round; one more comes first, to warm up."""
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for _ in tqdm(range(rounds + 1), desc=title, disable=None):
        for side, step in steps.items():
            started = time.process_time()
            step()
            seconds[side].append(time.process_time() - started)
    return {side: values[1:] for side, values in seconds.items()}


def measure_decoding(directory: Path, pictures: str | None, rounds: int) -> tuple[Rows, dict[str, float]]:
    """Pictures per second of all sides, and ours over the others'."""
    rows: Rows = []
    ratios: dict[str, float] = {}
    for (width, height), n_batches in SIZES.items():
        shard, n_samples = directory / f"{width}.tar", n_batches * BATCH_SIZE
        source = drawn_pictures(width, height) if pictures is None else given_pictures(pictures, width, height)
        write_shard(shard, source, n_samples)
        for augmentation in AUGMENTATIONS:
            steps = {
                "ours": make_ours(str(shard), augmentation),
                "theirs": make_theirs(str(shard), augmentation, as_floats=True),
                "uint8": make_theirs(str(shard), augmentation, as_floats=False),
            }
            seconds = time_in_turns(steps, rounds, f"{width} x {height}, {augmentation}")
            for side, took in seconds.items():
                row = {"pictures": f"{width} x {height}", "kB": round(shard.stat().st_size / n_samples / 1000)}
                per_second = round(n_samples / median(took))
                rows.append(row | {"augmentation": augmentation, "side": side, "per_second": per_second})
            for side, suffix in (("theirs", ""), ("uint8", "_uint8")):
                paired = [theirs / ours for theirs, ours in zip(seconds[side], seconds["ours"], strict=True)]
                ratios[f"decode_{width}_{augmentation}{suffix}"] = round(median(paired), 2)
    return rows, {"decode": ratios["decode_512_dvae"], **ratios}


@errors_in_one_line()
def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", help="tar files with JPEGs, a path or a glob in quotes (default: drawn ones)")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds of every side (default: 40)")
    default = Path("runs/bench/data.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--rounds", options.rounds, at_least=1)
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        rows, ratios = measure_decoding(Path(directory), options.pictures, options.rounds)
    tokens = measure_reading(rounds=2)
    (steps, _) = in_own_process(measure_step, 2)
    ratios["step_from_tokens"] = steps[0]["step_from_pictures_over_from_tokens"]
    write_report(options.out, [*rows, *tokens], ratios, steps=steps)
    print(machine())
    print_tables(options.out, rows, tokens, steps, [{"name": name, "ratio": ratio} for name, ratio in ratios.items()])


if __name__ == "__main__":
    main()
