"""What all evaluations on the command line share: options, the file with the numbers, the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dalle1.atomic_files import check_directory, write_json
from dalle1.evaluation.chunks import DEFAULT_CACHE
from dalle1.evaluation.extractors import Extractor, load_extractor
from dalle1.evaluation.feature_sets import Numbers
from dalle1.results import new_directory, versions
from dalle1.run_models import add_name_argument, default_model

FILE_NAME = "evaluation.json"
_FORMAT_VERSION = 1


def add_shared_arguments(parser: argparse.ArgumentParser, *, seed: bool = True) -> None:
    """Options of every evaluation that looks at features; `seed` for those that draw something."""
    add_name_argument(parser)
    parser.add_argument(
        "--extractor",
        action="append",
        metavar="KIND:PLACE",
        help="inception:FILE, clip:CHECKPOINT or hf:NAME_OR_DIR; may be given several times "
        f"(default: clip:{default_model('clip')})",
    )
    parser.add_argument(
        "--allow_download", action="store_true", help="fetch what is not here from the Hugging Face hub"
    )
    parser.add_argument(
        "--size", help="pixels of a side, or HEIGHTxWIDTH, that the largest centred part of each picture is resized to"
    )
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add_work_arguments(parser)


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every evaluation: where it computes, and where it keeps and writes what."""
    parser.add_argument(
        "--cache", type=Path, default=Path(DEFAULT_CACHE), help="of what is done (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="directory to write to (default: runs/evaluations/<command>-<time>)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")


def load_extractors(options: argparse.Namespace, *, classes: bool = False) -> list[Extractor]:
    """Those that the options name, else the CLIP of the run, on the CPU, each once; `classes` as `load_extractor`.

    Raises: ValueError or OSError as `load_extractor`; ValueError if one is named twice.
    """
    if options.extractor is None:
        options.extractor = [f"clip:{default_model('clip', options.name)}"]
    extractors = [
        load_extractor(specification, allow_download=options.allow_download, classes=classes)
        for specification in options.extractor
    ]
    names = [extractor.name for extractor in extractors]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"each extractor must be given once, got {twice} {names.count(twice)} times")
    return extractors


def choose_out(options: argparse.Namespace) -> Path:
    """The directory for the numbers. Raises: FileExistsError if the one that was asked for is not empty."""
    return check_directory(options.out) if options.out else new_directory("runs/evaluations", options.command)


def write_evaluation(
    out: Path,
    numbers: Numbers,
    *,
    options: argparse.Namespace,
    extractors: Sequence[Extractor],
    sets: Mapping[str, Mapping[str, Any]],
    more: Mapping[str, Any],
) -> None:
    """Write `evaluation.json`.

    Args:
        out: Directory, made when it is needed.
        numbers: What was measured.
        options: Of the command line.
        extractors: What features are from.
        sets: The pictures, by what they were used for (`PictureSet.facts`).
        more: What else the command has to say, in plain types.
    """
    settings = {name: _plain(value) for name, value in sorted(vars(options).items())}
    content = {
        "format_version": _FORMAT_VERSION,
        "command": options.command,
        "numbers": numbers.values,
        "notes": numbers.notes,
        **more,
        "settings": settings,
        "pictures": dict(sets),
        "extractors": {extractor.name: dict(extractor.facts) for extractor in extractors},
        "versions": versions() | {name: metadata.version(name) for name in ("torchmetrics", "pillow")},
    }
    write_json(out / FILE_NAME, content)


def print_numbers(numbers: Numbers) -> None:
    """The table of all numbers; notes go to stderr."""
    rows = [(name, f"{value:.6g}") for name, value in numbers.values.items()]
    print(tabulate(rows, headers=("number", "value"), disable_numparse=True, colalign=("left", "right")))
    for note in numbers.notes:
        print(f"note: {note}", file=sys.stderr)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
