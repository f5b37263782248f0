"""How well a transformer predicts captioned pictures: nats and accuracy of text and image tokens, by position.

PICTURES are shards, folders and tables of captioned pictures, or a directory that stage=tokens has made. The numbers
are those of validation during training; with a transformer that has learned pictures without a caption there is also
what captions help. Writes evaluation.json, image_positions.png and text_positions.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dalle1.atomic_files import atomic_directory
from dalle1.checkpoint import load_image_tokenizer, load_transformer
from dalle1.data.token_shards import MANIFEST, SPLITS
from dalle1.evaluation.captioned_tokens import CaptionedTokens
from dalle1.evaluation.command import FILE_NAME, add_work_arguments, choose_out, write_evaluation
from dalle1.evaluation.feature_sets import Numbers
from dalle1.evaluation.pictures import save_picture
from dalle1.evaluation.position_figures import draw_image_positions, draw_text_positions
from dalle1.evaluation.ranks import joined_ranks
from dalle1.evaluation.transformer_likelihood import TransformerNumbers, evaluate_transformer
from dalle1.run_models import add_name_argument, choose_models, default_model

_ROWS = (  # of the printed table
    "text_nats_per_token",
    "text_accuracy",
    "text_nats_per_caption",
    "text_tokens_per_caption",
    "first_text_token_nats",
    "caption_end_nats",
    "image_nats_per_token",
    "uniform_image_nats_per_token",
    "image_accuracy",
    "image_nats_per_picture",
    "image_bits_per_pixel_value",
    "first_image_token_nats",
    "last_image_token_nats",
    "image_nats_per_token_without_caption",
    "caption_gain_nats_per_picture",
    "caption_gain_share",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("pictures", nargs="+", metavar="PICTURES", help="shards, folders, tables, globs; or tokens")
    add_name_argument(parser)
    parser.add_argument("--transformer", metavar="PATH", help=f"(default: {default_model('transformer')})")
    parser.add_argument("--dvae", metavar="PATH", help=f"its dVAE; tokens need none (default: {default_model('dvae')})")
    parser.add_argument("--split", choices=SPLITS, default="val", help="of a directory of tokens (default: val)")
    parser.add_argument("--caption", default="text", help="text, lines or json:FIELD (default: %(default)s)")
    parser.add_argument("--truncate_captions", choices=("true", "false"), default="false", help="(default: false)")
    parser.add_argument("--on_bad_sample", choices=("error", "skip"), default="error", help="(default: error)")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences computed at once (default: %(default)s)")
    add_work_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, write and print. Raises: ValueError, TypeError or OSError with one sentence for what cannot be done."""
    out = choose_out(options)
    choose_models(options, transformer="transformer", dvae="dvae")
    transformer = load_transformer(options.transformer)
    has_tokens = len(options.pictures) == 1 and Path(options.pictures[0], MANIFEST).is_file()
    samples = CaptionedTokens.open(
        options.pictures,
        transformer,
        None if has_tokens else load_image_tokenizer(options.dvae),
        split=options.split,
        caption=options.caption,
        truncate_captions=options.truncate_captions == "true",
        on_bad_sample=options.on_bad_sample,
    )
    with joined_ranks() as ranks:
        device = ranks.choose_device(options.device)
        transformer.model.to(device)
        how: dict[str, Any] = {"cache": options.cache, "ranks": ranks, "device": device}
        numbers = evaluate_transformer(samples, transformer, batch_size=options.batch_size, **how)
        if not ranks.is_first:
            return
        facts = {"sha256": transformer.sha256, "step": transformer.step, "dvae_sha256": transformer.dvae_sha256}
        with atomic_directory(out) as directory:
            write_evaluation(
                directory,
                named_numbers(numbers),
                options=options,
                extractors=[],
                sets={"pictures": samples.facts},
                more={"checkpoints": {"transformer": facts}, "by_position": numbers.means_by_position()},
            )
            save_picture(draw_image_positions(numbers.positions), directory / "image_positions.png")
            save_picture(draw_text_positions(numbers.positions), directory / "text_positions.png")
    print(format_numbers(numbers))
    print(f"numbers: {out / FILE_NAME}")


def named_numbers(numbers: TransformerNumbers) -> Numbers:
    """Under names that say of how many captioned pictures they are, as those of all evaluations do."""
    n = numbers.values["samples"]
    values = {
        name if name in ("samples", "bad_samples") else f"{name}[n={n}]": value
        for name, value in numbers.values.items()
    }
    return Numbers(values=values, notes=[])


def format_numbers(numbers: TransformerNumbers) -> str:
    """The table that the command prints."""
    values = numbers.values
    rows = [
        (name.replace("_", " "), f"{values[name]:.5g}", f"± {values[error]:.2g}" if error in values else "")
        for name, error in ((name, f"{name}_error") for name in _ROWS)
        if name in values
    ]
    left_out = f", {values['bad_samples']:,} could not be used" if values["bad_samples"] else ""
    return f"{tabulate(rows, disable_numparse=True)}\n{values['samples']:,} captioned pictures{left_out}"
