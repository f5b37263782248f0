"""Which validation pictures are in the training set: the nearest training picture of each, by features.

`python -m dalle1.evaluate overlap train=PATH val=PATH [extractor=KIND:PLACE] [threshold=0.95]`. Writes overlap.html, on
which the closest pairs are looked at to choose a threshold, and overlap.json with all pairs and the keys of those
at or above the threshold, which `evaluate system without=overlap.json` leaves out. Features are kept: with another
threshold the command takes seconds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dalle1.atomic_files import atomic, atomic_directory, write_json
from dalle1.data.fields import require_int
from dalle1.evaluation.command import (
    add_shared_arguments,
    choose_out,
    load_extractors,
    print_numbers,
    write_evaluation,
)
from dalle1.evaluation.extractors import Extractor
from dalle1.evaluation.feature_sets import FeatureSet, Numbers, extract
from dalle1.evaluation.nearest import Nearest, nearest
from dalle1.evaluation.overlap_page import Pair, caption_of, render_overlap, thumbnail
from dalle1.evaluation.picture_sets import PictureSet, Treatment, open_pictures, parse_size
from dalle1.evaluation.ranks import joined_ranks
from dalle1.evaluation.readable_pictures import add_bad_sample_argument, readable

_QUANTILES = (0.5, 0.9, 0.99)  # of the similarities that are reported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--train", action="append", required=True, help="shards, folders, tables; may be repeated")
    parser.add_argument("--val", action="append", required=True, help="shards, folders, tables; may be repeated")
    parser.add_argument(
        "--threshold", type=float, default=0.95, help="cosine in [-1, 1] from which on a pair is one (%(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=200, help="pairs on the page (default: %(default)s)")
    add_bad_sample_argument(parser, pictures="pictures of both sets")
    add_shared_arguments(parser, seed=False)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """All pairs of a validation picture and its nearest training picture, the closest first."""

    extractor: str
    val: PictureSet
    train: PictureSet
    val_rows: list[int]
    train_rows: list[int]
    similarities: np.ndarray  # float64 (n,), cosines in descending order

    @classmethod
    def of(cls, extractor: str, val: PictureSet, train: PictureSet, found: Nearest) -> Overlap:
        """Sort what was found."""
        order = torch.argsort(found.similarities, descending=True, stable=True)
        return cls(
            extractor=extractor,
            val=val,
            train=train,
            val_rows=order.tolist(),
            train_rows=found.indices[order].tolist(),
            # To what float32 can tell, so that a picture is equal to itself.
            similarities=found.similarities[order].double().numpy().round(6),
        )

    def count(self, threshold: float) -> int:
        """Validation pictures whose similarity is at least `threshold`."""
        return int((self.similarities >= threshold).sum())

    def numbers(self, threshold: float) -> Numbers:
        """The share at or above the threshold, and how the similarities are distributed."""
        what = f"{self.extractor},n={len(self.val)}/{len(self.train)}"
        values = {f"overlap_share[{what},threshold={threshold:g}]": self.count(threshold) / len(self.val)}
        for quantile in _QUANTILES:
            values[f"similarity_quantile[{what},q={quantile:g}]"] = float(np.quantile(self.similarities, quantile))
        twice = [key for key, count in Counter(sample.key for sample in self.val.samples).items() if count > 1]
        notes = []
        if twice:
            notes.append(
                f"{len(twice)} keys stand for several validation pictures, such as {twice[0]!r}: leaving out one of "
                "these leaves out all"
            )
        return Numbers(values=values, notes=notes)

    def to_dict(self, threshold: float) -> dict[str, Any]:
        """What overlap.json holds."""
        n_above = self.count(threshold)
        return {
            "extractor": self.extractor,
            "threshold": threshold,
            "share": n_above / len(self.val),
            "keys": list(dict.fromkeys(self.val.samples[row].key for row in self.val_rows[:n_above])),
            "pairs": [
                {
                    "similarity": float(similarity),
                    "val": {"key": one.key, "container": one.container},
                    "train": {"key": other.key, "container": other.container},
                }
                for similarity, one, other in zip(
                    self.similarities,
                    (self.val.samples[row] for row in self.val_rows),
                    (self.train.samples[row] for row in self.train_rows),
                    strict=True,
                )
            ],
        }


def run(options: argparse.Namespace) -> None:
    """Compare, write and print. Raises: ValueError, TypeError or OSError with one sentence for what cannot be done."""
    if not -1 <= options.threshold <= 1:
        raise ValueError(f"threshold must be a cosine in [-1, 1], got {options.threshold:g}")
    require_int("pairs", options.pairs, at_least=1)
    treatment = Treatment(size=None if options.size is None else parse_size(options.size))
    out = choose_out(options)
    val, train = (open_pictures(each, on_bad_sample=options.on_bad_sample) for each in (options.val, options.train))
    (extractor, *others) = load_extractors(options)
    if others:
        raise ValueError(f"overlap needs one extractor, got {1 + len(others)}; give one")
    with joined_ranks() as ranks:
        device = ranks.choose_device(options.device)
        extractor.to(device)
        how: dict[str, Any] = {"cache": options.cache, "ranks": ranks}
        val, skipped = readable(val, label="validation pictures", **how)
        train, skipped_of_train = readable(train, label="training pictures", **how)
        of_val = extract(val, extractor, treatment, label="validation pictures", **how)
        of_train = extract(train, extractor, treatment, label="training pictures", **how)
        if not ranks.is_first:
            return
        overlap = Overlap.of(extractor.name, val, train, find_nearest(of_val, of_train, device))
        numbers = overlap.numbers(options.threshold)
        numbers |= Numbers(values={}, notes=[*skipped, *skipped_of_train])
        with atomic_directory(out) as directory:
            _write(directory, overlap, numbers, options, extractor)
    print_numbers(numbers)
    print(f"page:  {out / 'overlap.html'}\npairs: {out / 'overlap.json'}")


def find_nearest(val: FeatureSet, train: FeatureSet, device: torch.device) -> Nearest:
    """The nearest training picture of each validation picture; features of one chunk of these are in memory at once."""
    parts = (part[f"{train.prefix}features"] for part in train.chunks.parts())
    with tqdm(desc="comparing", total=len(train), unit=" pictures", disable=None) as bar:

        def told() -> Any:
            for part in parts:
                yield part
                bar.update(len(part))

        return nearest(val.features(), told(), device=device)


def shown_pairs(n: int, most: int) -> list[int]:
    """Which of n sorted pairs are on the page: the first half of `most`, and as many evenly from all the others.

    The closest are where duplicates are; the others show where these end."""
    if n <= most:
        return list(range(n))
    n_first = (most + 1) // 2
    others = np.linspace(n_first, n - 1, most - n_first).round().astype(int).tolist()
    return [*range(n_first), *others]


def _write(out: Path, overlap: Overlap, numbers: Numbers, options: argparse.Namespace, extractor: Extractor) -> None:
    sets = {"val": overlap.val.facts, "train": overlap.train.facts}
    write_evaluation(out, numbers, options=options, extractors=[extractor], sets=sets, more={})
    write_json(out / "overlap.json", overlap.to_dict(options.threshold))
    pairs = [
        _pair(overlap, place)
        for place in tqdm(shown_pairs(len(overlap.val), options.pairs), desc="page", unit=" pairs", disable=None)
    ]
    page = render_overlap(pairs, overlap.similarities, threshold=options.threshold, extractor=overlap.extractor)
    with atomic(out / "overlap.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _pair(overlap: Overlap, place: int) -> Pair:
    samples: Sequence[Any] = (
        overlap.val.samples[overlap.val_rows[place]],
        overlap.train.samples[overlap.train_rows[place]],
    )
    return Pair(
        place=place,
        similarity=float(overlap.similarities[place]),
        pictures=tuple(thumbnail(sample) for sample in samples),
        captions=tuple(caption_of(sample) for sample in samples),
        keys=tuple(sample.key for sample in samples),
        containers=tuple(sample.container for sample in samples),
    )
