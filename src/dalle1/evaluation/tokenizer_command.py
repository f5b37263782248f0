"""How good a dVAE is: rFID of any extractor, KID, PSNR, SSIM and code usage of what it makes of pictures.

`python -m dalle1.evaluate tokenizer IMAGES... [dvae=PATH] [extractor=KIND:PLACE] [size=256]`. IMAGES are tar shards,
folders, tables and globs of these. Without `size` pictures keep theirs. A command that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dalle1.checkpoint import Loaded, load_dvae
from dalle1.evaluation.chunks import CHUNK_SIZE, Chunks, compute_chunks
from dalle1.evaluation.codebook_usage import codebook_usage
from dalle1.evaluation.command import (
    add_shared_arguments,
    choose_out,
    load_extractors,
    print_numbers,
    write_evaluation,
)
from dalle1.evaluation.extractors import Extractor
from dalle1.evaluation.feature_sets import PICTURES_AT_ONCE, FeatureSet, Numbers, compare, extract, tensors_of
from dalle1.evaluation.image_quality import SSIM_SMALLEST_SIDE, psnr_db, squared_error, ssim
from dalle1.evaluation.picture_sets import PictureSet, Treatment, open_pictures, parse_size
from dalle1.evaluation.pictures import to_uint8
from dalle1.evaluation.ranks import Ranks, joined_ranks
from dalle1.models.dvae import DVAE
from dalle1.reconstruct import DEFAULT_CHECKPOINT, reconstruct_batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate tokenizer`."""
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="tar shards, folders, tables, globs of these")
    parser.add_argument("--dvae", default=DEFAULT_CHECKPOINT, help="(default: %(default)s)")
    add_shared_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, write and print. Raises: ValueError, TypeError or OSError with one sentence for what cannot be done."""
    treatment = Treatment(size=None if options.size is None else parse_size(options.size))
    out = choose_out(options)
    pictures = open_pictures(options.images)
    if len(pictures) < 2:
        raise ValueError("an evaluation needs at least 2 pictures, got 1; for one, python -m dalle1.reconstruct")
    dvae = load_dvae(options.dvae)
    extractors = load_extractors(options)
    with joined_ranks() as ranks:
        device = ranks.choose_device(options.device)
        dvae.model.to(device)
        for extractor in extractors:
            extractor.to(device)
        originals = {
            extractor.name: extract(
                pictures, extractor, treatment, cache=options.cache, ranks=ranks, label=f"{extractor.name}, originals"
            )
            for extractor in extractors
        }
        chunks = reconstruct_all(pictures, dvae, extractors, treatment, cache=options.cache, ranks=ranks)
        if not ranks.is_first:
            return
        numbers = quality(chunks, vocab_size=dvae.model.config.vocab_size)
        for extractor in extractors:
            seen = reconstructed_features(chunks, extractor, treatment)
            numbers |= compare(originals[extractor.name], seen, seed=options.seed, prefix="r")
        path = write_evaluation(
            out,
            numbers,
            options=options,
            extractors=extractors,
            sets={"pictures": pictures.facts},
            more={"checkpoints": {"dvae": {"sha256": dvae.sha256, "step": dvae.step}}},
        )
    print_numbers(numbers)
    print(f"numbers: {path}")


def reconstruct_all(
    pictures: PictureSet,
    dvae: Loaded[DVAE],
    extractors: Sequence[Extractor],
    treatment: Treatment,
    *,
    cache: Path,
    ranks: Ranks,
    chunk_size: int = CHUNK_SIZE,
) -> Chunks:
    """What the dVAE makes of all pictures, as numbers: errors, counts of codes, and features of the reconstructions.

    Raises: ValueError or OSError with one sentence if a picture cannot be read.
    """

    def compute(numbers: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        counts = torch.zeros(1, dvae.model.config.vocab_size, dtype=torch.int64)
        features = defaultdict(list)
        for group in pictures.decoded(numbers, treatment, at_once=PICTURES_AT_ONCE):
            seen = []
            for same in _of_one_size(group):
                pixels, tokens, errors = _reconstruct(dvae.model, same)
                seen += list(pixels)
                counts += torch.bincount(tokens.flatten(), minlength=counts.shape[1])
                for name, values in errors.items():
                    parts[name].append(values)
            for extractor in extractors:
                features[extractor.name].append(extractor(seen))
        tensors = {name: torch.cat(values) for name, values in parts.items()} | {"code_counts": counts}
        for name, of_groups in features.items():
            tensors |= tensors_of(of_groups, prefix=f"{name}.")
        return tensors

    recipe = {
        "what": "reconstructions",
        "pictures": pictures.sha256,
        "dvae": dvae.sha256,
        "extractors": [extractor.name for extractor in extractors],
        "treatment": treatment.facts,
        "at_once": PICTURES_AT_ONCE,
    }
    return compute_chunks(
        compute, len(pictures), recipe=recipe, cache=cache, ranks=ranks, label="reconstructions", chunk_size=chunk_size
    )


def reconstructed_features(chunks: Chunks, extractor: Extractor, treatment: Treatment) -> FeatureSet:
    """The features of an extractor in what `reconstruct_all` gave."""
    return FeatureSet(
        extractor=extractor.name,
        n_features=extractor.n_features,
        treatment=treatment,
        chunks=chunks,
        prefix=f"{extractor.name}.",
    )


def quality(chunks: Chunks, *, vocab_size: int) -> Numbers:
    """Mean errors over pictures, and how all of them together use the codebook."""
    tensors = chunks.load()
    what = f"n={chunks.n}"
    values = {f"{name}[{what}]": float(tensors[name].double().mean()) for name in ("mse", "psnr_db")}
    notes = []
    known = tensors["ssim"][tensors["ssim"].isfinite()].double()
    if len(known):
        values[f"ssim[n={len(known)}]"] = float(known.mean())
    if len(known) < chunks.n:
        notes.append(f"SSIM needs sides of {SSIM_SMALLEST_SIDE} pixels, {chunks.n - len(known)} pictures have less")
    usage = codebook_usage(tensors["code_counts"].sum(0))
    values |= {
        f"codes_used[{what},vocab={vocab_size}]": float(usage.n_used),
        f"codes_used_share[{what},vocab={vocab_size}]": usage.used_share,
        f"code_perplexity[{what},vocab={vocab_size}]": usage.perplexity,
    }
    return Numbers(values=values, notes=notes)


def _of_one_size(pictures: Sequence[Tensor]) -> list[Tensor]:
    """uint8 (b, 3, h, w) each: consecutive pictures of one size."""
    groups: list[list[Tensor]] = []
    for picture in pictures:
        if groups and groups[-1][0].shape == picture.shape:
            groups[-1].append(picture)
        else:
            groups.append([picture])
    return [torch.stack(group) for group in groups]


@torch.inference_mode()
def _reconstruct(dvae: DVAE, pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Reconstructions as uint8 (b, 3, h, w), tokens, and float32 (b,) errors, all on the CPU."""
    image = pixels.to(next(dvae.parameters()).device).float() / 255
    seen, tokens = reconstruct_batch(dvae, image)
    error = squared_error(seen, image)
    similarity = torch.full_like(error, math.nan)
    if min(image.shape[-2:]) >= SSIM_SMALLEST_SIDE:
        similarity = ssim(seen, image)
    errors = {"mse": error, "psnr_db": psnr_db(error), "ssim": similarity}
    # Extractors see what a file would hold.
    levels = torch.from_numpy(to_uint8(seen)).permute(0, 3, 1, 2)
    return levels, tokens.cpu(), {name: values.cpu() for name, values in errors.items()}
