"""Reads a data set full of damage for a long time and watches the memory: `make soak-data`.

Two ranks with two loader workers each read 10,000 batches, once indexed and once as a stream. One shard in 20 is cut
short, one is no tar, one is missing, and after a third of the time one more vanishes and one is cut while it is in use;
of the samples, one in 20 each has a picture that is cut short, empty, noise, or of more megapixels than allowed, no
picture, no caption, an empty one, one that is not UTF-8, one of 100 kB, or the key of another one. Every batch must be
full. Memory is that of each rank with its workers, what they share counted once, without files such as libraries
(Pss_Anon and Pss_Shmem of Linux), and must stay within 5% of what it is after a fifth of the time.
"""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import os
import statistics
import struct
import tarfile
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import psutil
from measure import Rows, machine, print_tables, write_report
from PIL import Image
from tqdm import tqdm

from dalle1.atomic_files import atomic
from dalle1.cli import errors_in_one_line
from dalle1.data.config import DataConfig
from dalle1.data.datamodule import PairDataModule
from dalle1.data.fields import require_int
from dalle1.tokenizers.caption_encoder import CaptionEncoder
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig

N_RANKS, N_WORKERS, BATCH_SIZE = 2, 2, 8
# More shards than are kept open, so that one that vanishes is missed.
N_SHARDS, SAMPLES_PER_SHARD, SIDE = 100, 40, 64
WARM_UP = 0.2  # share of the batches
EVERY = 50  # batches between two looks at the memory
TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Look:
    """The memory of one rank and its workers after some batches."""

    rank: int
    batches: int
    megabytes: float


def bomb() -> bytes:
    """A PNG of 121 megapixels in a few bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 11_000, 11_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def damage(number: int, picture: bytes, caption: bytes) -> dict[str, bytes]:
    """The files of sample `number`: half of twenty in a row are good, each of the others has damage of its own."""
    key = f"{number:06d}"
    files = {f"{key}.jpg": picture, f"{key}.txt": caption}
    match number % 20:
        case 0:
            files[f"{key}.jpg"] = picture[: len(picture) // 2]
        case 2:
            files[f"{key}.jpg"] = b""
        case 4:
            files[f"{key}.jpg"] = os.urandom(500)
        case 6:
            files[f"{key}.jpg"] = bomb()
        case 8:
            del files[f"{key}.jpg"]
        case 10:
            del files[f"{key}.txt"]
        case 12:
            files[f"{key}.txt"] = b" \n"
        case 14:
            files[f"{key}.txt"] = b"caf\xe9 \xff"
        case 16:
            files[f"{key}.txt"] = b"long " * 20_000
        case 18:
            files = {f"{key}.png": picture, **files}  # a second picture of the key
    return files


def write_shards(folder: Path) -> str:
    """Write the data set and return its name for `data.train`."""
    rng = np.random.default_rng(0)
    for shard in range(N_SHARDS):
        path = folder / f"{shard:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(SAMPLES_PER_SHARD):
                coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                file = io.BytesIO()
                coarse.resize((SIDE + i % 30, SIDE), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
                number = shard * SAMPLES_PER_SHARD + i
                for name, content in damage(number, file.getvalue(), b"picture number %d" % number).items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        match shard % 20:
            case 3:
                os.truncate(path, path.stat().st_size * 2 // 3)
            case 7:
                path.write_bytes(b"<html>404</html>" * 100)
            case 11:
                path.unlink()
    return f"{folder}/{{000..{N_SHARDS - 1:03d}}}.tar"


def damage_later(folder: Path) -> None:
    """What happens while the shards are read."""
    for shard in range(N_SHARDS):
        path = folder / f"{shard:03d}.tar"
        match shard % 20:
            case 15:
                path.unlink()
            case 19:
                os.truncate(path, path.stat().st_size // 2)


def read(rank: int, shards: str, backend: Any, n_batches: int, folder: Path, connection: Connection) -> None:
    """One rank: read batches, tell the memory, and at last what was found."""
    # As in a process that a trainer starts; from this one the workers would inherit `spawn`, and not the log's level.
    multiprocessing.set_start_method("fork", force=True)
    logging.getLogger("dalle1").setLevel(logging.ERROR)
    tokenizer = TextTokenizer.train(["picture number 0123456789"], TextTokenizerConfig(vocab_size=300, seq_len=16))
    config = DataConfig(
        train=shards,
        val=shards,
        backend=backend,
        image_size=32,
        batch_size=BATCH_SIZE,
        num_workers=N_WORKERS,
        stream_buffer=200,
        shuffle_window=2000,
        augmentation="dvae",
        on_bad_sample="skip",
        max_bad_fraction=1.0,
    )
    data = PairDataModule(config, CaptionEncoder(tokenizer, truncate=True, bpe_dropout=0.1))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=N_RANKS)  # type: ignore[assignment]
    loader = data.train_dataloader()
    done = 0
    while done < n_batches:
        for batch in loader:
            assert batch["pixels"].shape == (BATCH_SIZE, 3, 32, 32), batch["pixels"].shape
            assert batch["text_tokens"].shape == (BATCH_SIZE, 16), batch["text_tokens"].shape
            done += 1
            if done % EVERY == 0:
                connection.send(Look(rank=rank, batches=done, megabytes=_megabytes()))
            if rank == 0 and done == n_batches // 3:
                damage_later(folder)
            if done == n_batches:
                break
    loader.close()
    connection.send(dict(loader.findings.count()))


def _megabytes() -> float:
    process = psutil.Process()
    kilobytes = 0
    for each in (process, *process.children()):
        lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return kilobytes / 1e3


def soak(backend: str, n_batches: int, folder: Path) -> tuple[list[Look], dict[str, int], float]:
    """Read with two ranks; gives the looks at the memory, what was found and batches per second."""
    folder.mkdir()
    shards = write_shards(folder)
    context = multiprocessing.get_context("spawn")
    looks: list[Look] = []
    found: dict[str, int] = {}
    connections: dict[Any, Any] = {}
    started = time.monotonic()
    for rank in range(N_RANKS):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=read, args=(rank, shards, backend, n_batches, folder, there))
        process.start()
        there.close()
        connections[here] = process
    with tqdm(total=N_RANKS * n_batches, desc=backend, unit="batch", disable=None) as bar:
        while connections:
            for ready in wait_for(list(connections)):
                connection: Any = ready
                try:
                    news = connection.recv()
                except EOFError as error:
                    process = connections.pop(connection)
                    process.join()
                    if process.exitcode:
                        raise RuntimeError("a reading process has died; its error is above") from error
                    continue
                if isinstance(news, Look):
                    looks.append(news)
                    bar.update(EVERY)
                else:
                    found = {kind: max(found.get(kind, 0), count) for kind, count in (found | news).items()}
    return looks, found, N_RANKS * n_batches / (time.monotonic() - started)


def drift(looks: list[Look], n_batches: int) -> float:
    """The largest distance, as a share, of the memory of a rank from what it is right after the warm-up.

    Medians of twenty looks each, since what a worker holds at one moment is chance.
    """
    largest = 0.0
    for rank in range(N_RANKS):
        series = [look.megabytes for look in looks if look.rank == rank and look.batches > WARM_UP * n_batches]
        width = min(20, max(1, len(series) // 4))
        medians = [statistics.median(series[i : i + width]) for i in range(0, len(series) - width + 1, width)]
        largest = max(largest, *(abs(each / medians[0] - 1) for each in medians))
    return largest


def draw(curves: dict[str, list[Look]], path: Path) -> None:
    """Memory over batches, a line for each rank and backend."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for backend, looks in curves.items():
        for rank in range(N_RANKS):
            mine = [look for look in looks if look.rank == rank]
            label = f"{backend}, rank {rank} and {N_WORKERS} workers"
            axes.plot([look.batches for look in mine], [look.megabytes for look in mine], label=label, linewidth=1)
    axes.set(xlabel="batches", ylabel="MB", ylim=(0, None))
    axes.legend(fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


@errors_in_one_line()
def main() -> None:
    """Command line; exit code 1 if the memory drifts by more than 5%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10_000, help="of each rank (default: 10000)")
    default = Path("runs/bench/data_soak.json")
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default}")
    options = parser.parse_args()
    require_int("--batches", options.batches, at_least=1000)
    rows: Rows = []
    counts: dict[str, dict[str, int]] = {}
    curves: dict[str, list[Look]] = {}
    ratios: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("indexed", "stream"):
            looks, found, rate = soak(backend, options.batches, Path(folder, backend))
            curves[backend], counts[backend] = looks, found
            last = max(look.batches for look in looks)
            ratios[f"drift_{backend}"] = round(drift(looks, options.batches), 4)
            rows.append(
                {
                    "backend": backend,
                    "batches": N_RANKS * last,
                    "megabytes_at_end": [round(look.megabytes) for look in looks if look.batches == last],
                    "largest_drift": ratios[f"drift_{backend}"],
                    "batches_per_second": round(rate),
                    "kinds_of_damage": len(found),
                }
            )
    found_rows = [
        {"backend": backend, "kind": kind, "count": n} for backend in counts for kind, n in counts[backend].items()
    ]
    memory = [asdict(look) | {"backend": backend} for backend, looks in curves.items() for look in looks]
    write_report(options.out, rows, ratios, found=found_rows, memory=memory)
    draw(curves, options.out.with_suffix(".png"))
    print(machine())
    print_tables(options.out, rows, found_rows)
    if any(share is not None and share > TOLERANCE for share in ratios.values()):
        raise ValueError(f"memory must stay within {TOLERANCE:.0%} after the warm-up, got {ratios}")


if __name__ == "__main__":
    main()
