"""Leaving out the pictures of a set that cannot be decoded, where users ask for that."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from dalle1.data.dataset import BadSamples
from dalle1.data.sample_index import SampleIndex
from dalle1.evaluation.chunks import compute_chunks
from dalle1.evaluation.picture_sets import MOST_THREADS, PictureSet
from dalle1.evaluation.ranks import Ranks


def add_bad_sample_argument(parser: argparse.ArgumentParser, *, pictures: str) -> None:
    """The option for what is done about `pictures` that cannot be decoded."""
    parser.add_argument(
        "--on_bad_sample",
        choices=("error", "skip"),
        default="error",
        help=f"{pictures} that cannot be decoded: skip tries all beforehand, and leaves these out (default: error)",
    )


def readable(pictures: PictureSet, *, cache: Path, ranks: Ranks, label: str) -> tuple[PictureSet, list[str]]:
    """The pictures that can be decoded, and notes of what is left out; all of them unless those are skipped.

    All processes decode every picture once, and keep which ones could be. Those left out are logged when they are met,
    and damages of shards each time. A picture that could not be read at all is left out until the cache is removed.

    Args:
        pictures: Opened by `open_pictures`.
        cache: See `compute_chunks`.
        ranks: The processes that share the work.
        label: What these pictures are, in the progress bar and the note.

    Raises: ValueError if none is left; what `compute_chunks` raises.
    """
    if pictures.on_bad_sample != "skip":
        return pictures, []
    index = pictures.samples
    assert isinstance(index, SampleIndex), "as open_pictures has opened it"
    bad_samples = BadSamples("skip")
    notes = []
    if index.damages:
        notes.append(f"{label}: damaged shards, of which the rest was used: {index.damages[0].message}")
    if ranks.is_first:
        for damage in index.damages:
            bad_samples.pass_over_damage(damage)

    def compute(numbers: range) -> dict[str, Tensor]:
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
            faults = list(pool.map(pictures.fault, numbers))
        for fault in faults:
            if fault is not None:
                bad_samples.pass_over(fault)
        return {"is_readable": torch.tensor([fault is None for fault in faults])}

    recipe = {"what": "pictures that can be decoded", "pictures": pictures.sha256}
    chunks = compute_chunks(compute, len(pictures), recipe=recipe, cache=cache, ranks=ranks, label=f"decoding {label}")
    is_readable = chunks.load(["is_readable"])["is_readable"]
    n_skipped = len(is_readable) - int(is_readable.sum())
    if n_skipped == len(pictures):
        raise ValueError(f"at least one picture must be good, got {n_skipped} that cannot be decoded; mend them")
    if n_skipped:
        notes.append(f"{label}: {n_skipped} of {len(pictures)} cannot be decoded and are left out")
        pictures = pictures.keep(is_readable.nonzero()[:, 0].numpy())
    return pictures, notes
