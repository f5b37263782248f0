"""Weights that others released, as a checkpoint of ours: `python -m dalle1.convert openai-dvae ... --out DIR`.

Nothing in the files is run; see docs/released_weights.md.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from dalle1.atomic_files import check_directory
from dalle1.checkpoint import make_record, write_exported
from dalle1.cli import errors_in_one_line
from dalle1.released.openai_dvae import build_dvae
from dalle1.released.weights_file import read_weights

_GRID = 32  # image tokens a side in the paper


def convert_openai_dvae(encoder: str | Path, decoder: str | Path, out: str | Path) -> str:
    """Write the dVAE in OpenAI's two files as an exported checkpoint, and return what there is to say about it.

    Raises: FileNotFoundError or ValueError as `read_weights` and `build_dvae`; FileExistsError as `write_exported`.
    """
    out = check_directory(out)
    model = build_dvae(read_weights(encoder), read_weights(decoder))
    sha256 = write_exported(out, model, make_record(model), step=0)
    config = model.config
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    side = config.downsampling
    options = f"image_vocab_size={config.vocab_size} image_size={_GRID * side} grid_size={_GRID}"
    return (
        f"dVAE of {n_weights:,} weights: {config.vocab_size:,} codes, one token for {side}x{side} pixels\n"
        f"written: {out} (hash of the weights {sha256[:12]})\n"
        f"next:    python train.py stage=transformer {shlex.quote(f'dvae={out}')} {options} ..."
    )


@errors_in_one_line()
def main() -> None:
    """Command line of the conversions."""
    parser = argparse.ArgumentParser(prog="python -m dalle1.convert", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    dvae = commands.add_parser("openai-dvae", help="the dVAE that OpenAI released with DALL-E")
    dvae.add_argument("--encoder", required=True, help="encoder.pkl, or its state dict (.pt, .safetensors)")
    dvae.add_argument("--decoder", required=True, help="decoder.pkl, or its state dict")
    dvae.add_argument("--out", required=True, help="directory to make")
    options = parser.parse_args()
    print(convert_openai_dvae(options.encoder, options.decoder, options.out))


if __name__ == "__main__":
    main()
