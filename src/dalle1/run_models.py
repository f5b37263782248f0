"""The models of a training run, by its name: what commands take where no checkpoints are given."""

from __future__ import annotations

import argparse

DEFAULT_NAME = "shapes"  # the demo's, as in sample.py


def add_name_argument(parser: argparse.ArgumentParser) -> None:
    """The option that names the run; `choose_models` follows it."""
    parser.add_argument(
        "--name", default=DEFAULT_NAME, help="training run whose models count, in runs/NAME (default: %(default)s)"
    )


def default_model(stage: str, name: str = "NAME") -> str:
    """The last checkpoint of a stage of a run; by default as it is written in help."""
    return f"runs/{name}/{stage}/checkpoints/last.ckpt"


def choose_models(options: argparse.Namespace, **stages: str) -> None:
    """Set the options that were not given to the checkpoints of the run `options.name`.

    `stages` has the stage of each option, such as `ckpt="dvae"`.
    """
    for option, stage in stages.items():
        if getattr(options, option) is None:
            setattr(options, option, default_model(stage, options.name))
