"""A trained network without its training: `python -m dalle1.export runs/shapes/transformer`.

RUN is a run's directory, or one of its checkpoints. What is written, `model.safetensors`, `config.json` and, of
networks that read captions, `tokenizer.json`, can be given wherever a checkpoint can; see docs/architecture.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from dalle1.atomic_files import check_directory
from dalle1.checkpoint import EMA_KEY, RECORD_KEY, build_model, check_sums, read_checkpoint, weights_of, write_exported
from dalle1.cli import OptionError, dashed_options, errors_in_one_line
from dalle1.sharded_files import is_sharded

LAST = Path("checkpoints") / "last.ckpt"
# What a user does with each kind next.
_NEXT = {
    "dvae": "python train.py stage=transformer {dvae} name=... experiment=...",
    "clip": "python sample.py rerank=clip {rerank.model} prompt=...",
    "transformer": "python sample.py {transformer} dvae=... prompt=...",
}


def export(run: str | Path, out: str | Path | None = None, *, weights: str | None = None) -> str:
    """Write the network of a run as an exported checkpoint, and return what there is to say about it.

    In memory are its weights, 4 bytes each, and never the optimizer's state, also of checkpoints in parts.

    Args:
        run: A run's directory, of which the last checkpoint is taken, or a checkpoint.
        out: The directory to make; `exported` in a run's directory if not given.
        weights: `ema`, the average, or `trained`, the weights themselves; if not given, the average where training kept
            one.

    Raises: FileNotFoundError or ValueError as `read_checkpoint`, and ValueError for other `weights`, a checkpoint that
        is exported already, or an average that was not kept; FileExistsError if `out` exists and is not empty.
    """
    if weights not in (None, "ema", "trained"):
        raise OptionError(f"weights must be ema or trained, got {weights!r}")
    path, out = _find(Path(run), out)
    out = check_directory(out)
    check_sums(path)
    content = read_checkpoint(path, mapped=True, average=weights != "trained")
    has_average = bool(content.get(EMA_KEY))
    if weights == "ema" and not has_average:
        raise ValueError(f"'{path}' must hold an average for weights=ema, its run kept none; leave weights= out")
    is_average = has_average and weights != "trained"
    record = content[RECORD_KEY]
    with torch.device("meta"):
        model = build_model(record)
    model.load_state_dict(weights_of(content, average=is_average), assign=True)
    sha256 = write_exported(out, model, record, step=content["global_step"])
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    option = _NEXT[record["kind"]]
    name = option[option.index("{") + 1 : option.index("}")]
    return (
        f"{record['kind']} of {n_weights:,} weights after {content['global_step']:,} updates, "
        f"{'their average' if is_average else 'as trained'}\n"
        f"written: {out} (hash of the weights {sha256[:12]})\n"
        f"next:    {option.replace('{' + name + '}', shlex.quote(f'{name}={out}'))}"
    )


def _find(run: Path, out: str | Path | None) -> tuple[Path, str | Path]:
    """The checkpoint, and where to write."""
    if (run / LAST).exists():
        return run / LAST, out or run / "exported"
    if run.is_dir() and not is_sharded(run):
        raise FileNotFoundError(
            f"'{run}' must be a run's directory with {LAST}, or a checkpoint of one, it is neither; correct the path"
        )
    if not run.exists():
        raise FileNotFoundError(f"no run and no checkpoint at '{run}'; correct the path")
    if out is None:
        raise OptionError(f"out must be given for a single checkpoint, as in out={run.stem}-exported")
    return run, out


@errors_in_one_line()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dalle1.export",
        description=__doc__,
        epilog="Options may also be written without dashes: out=DIR.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory, or a checkpoint")
    parser.add_argument("--out", help="directory to make (default: RUN/exported)")
    parser.add_argument("--weights", help="ema or trained (default: the average if training kept one)")
    options = parser.parse_intermixed_args(dashed_options(sys.argv[1:], ("out", "weights")))
    print(export(options.run, options.out, weights=options.weights))


if __name__ == "__main__":
    main()
