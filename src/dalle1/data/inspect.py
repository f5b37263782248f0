"""What a data set is, before anything is trained on it: `python -m dalle1.data.inspect SHARDS... [option=value ...]`.

SHARDS are all that `data.train` takes: shards, globs, ranges in braces, folders, CSV and JSONL tables, addresses. It
prints counts, damage, bad samples, sizes, captions, metadata and what filters would leave out, and writes into a new
directory `report.json` with all numbers, `histograms.png`, `samples.png` with samples drawn at random, `dropped.png`
with what filters leave out, and `codes.png` where there are image tokens. Options are in conf/inspect.yaml.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from dalle1.atomic_files import atomic_directory, check_directory, write_json
from dalle1.cli import OptionError, errors_in_one_line, run_script
from dalle1.data.captions import CaptionSource
from dalle1.data.fields import require_bool, require_int
from dalle1.data.folders import TABLE_EXTENSIONS
from dalle1.data.remote import expand_addresses
from dalle1.data.sample_index import SampleIndex
from dalle1.data.shard_cache import read_shards
from dalle1.data.shards import expand_shards
from dalle1.data.sources import is_remote, open_index
from dalle1.data.survey import Survey, SurveyOptions
from dalle1.data.survey_pictures import block_of_samples, blocks_of_dropped, save_histograms
from dalle1.data.survey_report import Find, distributions, summarize
from dalle1.data.survey_scan import survey_index, survey_stream
from dalle1.data.survey_text import to_text
from dalle1.evaluation.pictures import draw_code_use, save_picture
from dalle1.picture_grid import draw_page
from dalle1.results import new_directory

_OPTION = re.compile(r"(\+\+?|~)?([a-z_]+(\.[A-Za-z0-9_]+)*|hydra/[a-z_]+)")
# Flags of Hydra whose value is the next argument.
_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
)
_LONGEST_NAME = 40


def inspect_data(cfg: DictConfig, places: Sequence[str]) -> None:
    """Look at the samples in `places` as `cfg` (conf/inspect.yaml) says, write what there is to see, print the rest.

    Raises: ValueError, TypeError or OSError with one sentence for what cannot be done.
    """
    if not places:
        raise OptionError("shards must be named, as in python -m dalle1.data.inspect 'shards/train-*.tar'")
    options = SurveyOptions(
        caption=CaptionSource(setting=cfg.caption),
        filters=instantiate(cfg.filters, _convert_="all"),
        **{name: cfg[name] for name in ("decode", "samples", "seed", "image_size")},
    )
    require_int("num_workers", 0 if cfg.num_workers is None else cfg.num_workers, at_least=0)
    require_bool("allow_pipe", cfg.allow_pipe)
    for place in places:
        if place.startswith("pipe:") and not cfg.allow_pipe:
            raise ValueError(f"a command is only run with allow_pipe=true, got {place!r}")
    out = new_directory("runs/inspect", _name(places)) if cfg.out is None else check_directory(cfg.out)
    find: Find | None = None
    if any(map(is_remote, places)):
        survey = survey_stream(expand_addresses(places, allow_pipe=cfg.allow_pipe), options)
        if not survey.n_samples:
            damages = survey.damages
            raise _empty(places, [mention.note for kind in damages.counts for mention in damages.of(kind)])
    else:
        index = _open(places)
        survey, find = survey_index(index, options, num_workers=cfg.num_workers), index.__getitem__
    report = summarize(survey, options, places=places, find=find)
    with atomic_directory(out) as directory:
        write_json(directory / "report.json", report)
        _draw(survey, options, find, directory)
    _print(f"{to_text(report)}\n\nfiles: {out}")


def _open(places: Sequence[str]) -> SampleIndex:
    """Raises: as `open_index`; where nothing but damage is found, that is told."""
    try:
        return open_index(places, skip_damage=True)
    except ValueError as error:
        if any(os.path.isdir(place) or place.lower().endswith(TABLE_EXTENSIONS) for place in places):
            raise
        contents = read_shards(expand_shards(list(places), missing_ok=True))
        damages = [damage.message for content in contents for damage in content.damages]
        if not damages:
            raise
        raise _empty(places, damages) from error


def _empty(places: Sequence[str], damages: Sequence[str]) -> ValueError:
    where = repr(places[0]) + _more(places)
    reason = f"; {damages[0]}{_more(damages)}" if damages else ""
    return ValueError(f"shards must hold samples, such as 01.jpg and 01.txt; there are none in {where}{reason}")


def _more(several: Sequence[str]) -> str:
    return f" (and {len(several) - 1:,} more)" if len(several) > 1 else ""


def _draw(survey: Survey, options: SurveyOptions, find: Find | None, directory: Path) -> None:
    """Write the pictures that there are."""
    if any(distribution.n for distribution, _ in distributions(survey).values()):
        save_histograms(survey, options, directory / "histograms.png")
    if samples := block_of_samples(survey, options, find):
        save_picture(draw_page([samples]), directory / "samples.png")
    if dropped := list(blocks_of_dropped(survey, options, find)):
        save_picture(draw_page(dropped), directory / "dropped.png")
    if len(survey.tokens.codes):
        title = f"{int(survey.tokens.codes.sum()):,} image tokens"
        save_picture(draw_code_use(torch.from_numpy(survey.tokens.codes), title), directory / "codes.png")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Places, and what is for Hydra: flags and `key=value`, except where that is the path of something."""
    places: list[str] = []
    options: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, separator, _ = argument.partition("=")
        is_option = separator and _OPTION.fullmatch(name)
        is_path = os.path.lexists(argument) or bool(glob.glob(argument, recursive=True))
        is_flag = argument.startswith("-") or before in _FLAGS_WITH_VALUE
        (options if is_flag or (is_option and not is_path) else places).append(argument)
    return places, options


def _name(places: Sequence[str]) -> str:
    """A name for a directory: of the first place, the last part that has letters or digits."""
    for part in reversed(PurePosixPath(places[0]).parts):
        if name := re.sub("[^A-Za-z0-9]+", "-", part.partition(".")[0]).strip("-"):
            return name[:_LONGEST_NAME]
    return "data"


def _print(text: str) -> None:
    """Print what the terminal can show, and the rest as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


@errors_in_one_line()
def main() -> None:
    """Command line: places and Hydra's options in any order."""
    config_dir = Path("conf").absolute()
    if not (config_dir / "inspect.yaml").is_file():
        raise FileNotFoundError(f"no configuration in '{config_dir}'; run this in the directory of train.py")
    places, sys.argv[1:] = split_arguments(sys.argv[1:])
    run_script(
        lambda cfg: inspect_data(cfg, places), config_dir=config_dir, config_name="inspect", path_options=("out",)
    )


if __name__ == "__main__":
    main()
