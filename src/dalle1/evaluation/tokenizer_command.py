"""How good a dVAE is: rFID of any extractor, KID, PSNR, SSIM, likelihood and code usage of what it makes of pictures.

`python -m dalle1.evaluate tokenizer IMAGES... [name=RUN] [extractor=KIND:PLACE] [size=256]`. IMAGES are tar shards,
folders, tables and globs of these. Without `size` pictures keep theirs. A command that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from dalle1.checkpoint import load_dvae, training_options
from dalle1.evaluation.command import (
    FILE_NAME,
    add_shared_arguments,
    choose_out,
    load_extractors,
    print_numbers,
    write_evaluation,
)
from dalle1.evaluation.feature_sets import Numbers, compare, extract
from dalle1.evaluation.picture_sets import PictureSet, Treatment, open_pictures, parse_size
from dalle1.evaluation.ranks import joined_ranks
from dalle1.evaluation.readable_pictures import add_bad_sample_argument, readable
from dalle1.evaluation.reconstructions import Likelihood, quality, reconstruct_all, reconstructed_features
from dalle1.run_models import choose_models, default_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate tokenizer`."""
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="tar shards, folders, tables, globs of these")
    parser.add_argument("--dvae", metavar="PATH", help=f"(default: {default_model('dvae')})")
    parser.add_argument(
        "--temperature", type=float, default=1 / 16, help="of relaxed codes (default: %(default)s, the paper's last)"
    )
    parser.add_argument(
        "--min_log_scale", type=float, help="floor on ln b of likelihoods (default: what the dVAE was trained with)"
    )
    add_bad_sample_argument(parser, pictures="pictures")
    add_shared_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, write and print. Raises: ValueError, TypeError or OSError with one sentence for what cannot be done."""
    treatment = Treatment(size=None if options.size is None else parse_size(options.size))
    out = choose_out(options)
    choose_models(options, dvae="dvae")
    pictures = _at_least_two(open_pictures(options.images, on_bad_sample=options.on_bad_sample))
    dvae = load_dvae(options.dvae)
    likelihood, notes = _likelihood(options)
    extractors = load_extractors(options)
    with joined_ranks() as ranks:
        device = ranks.choose_device(options.device)
        dvae.model.to(device)
        for extractor in extractors:
            extractor.to(device)
        pictures, skipped = readable(pictures, cache=options.cache, ranks=ranks, label="pictures")
        _at_least_two(pictures)
        originals = {
            extractor.name: extract(
                pictures, extractor, treatment, cache=options.cache, ranks=ranks, label=f"{extractor.name}, originals"
            )
            for extractor in extractors
        }
        chunks = reconstruct_all(pictures, dvae, extractors, treatment, likelihood, cache=options.cache, ranks=ranks)
        if not ranks.is_first:
            return
        numbers = quality(chunks, likelihood, vocab_size=dvae.model.config.vocab_size)
        numbers |= Numbers(values={}, notes=[*notes, *skipped])
        for extractor in extractors:
            seen = reconstructed_features(chunks, extractor, treatment)
            numbers |= compare(originals[extractor.name], seen, seed=options.seed, prefix="r")
        write_evaluation(
            out,
            numbers,
            options=options,
            extractors=extractors,
            sets={"pictures": pictures.facts},
            more={"checkpoints": {"dvae": {"sha256": dvae.sha256, "step": dvae.step}}},
        )
    print_numbers(numbers)
    print(f"numbers: {out / FILE_NAME}")


def _at_least_two(pictures: PictureSet) -> PictureSet:
    if len(pictures) < 2:
        raise ValueError("an evaluation needs at least 2 pictures, got 1; for one, python -m dalle1.reconstruct")
    return pictures


def _likelihood(options: argparse.Namespace) -> tuple[Likelihood, list[str]]:
    """How likelihoods are computed, and what there is to say of that."""
    floor, notes = options.min_log_scale, list[str]()
    if floor is None:
        trained: dict[str, Any] = training_options(options.dvae).get("optim", {})
        floor = trained.get("min_log_scale", -math.inf)
        if not trained:
            notes.append(
                "likelihoods have no floor on ln b, as an exported checkpoint does not say which one it was trained "
                "with; give it as min_log_scale"
            )
    return Likelihood(min_log_scale=floor, temperature=options.temperature, seed=options.seed), notes
