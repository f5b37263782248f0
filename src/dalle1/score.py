"""How likely pictures are under captions: `python -m dalle1.score IMAGES... [name=RUN] [out=DIR]`.

IMAGES are files, folders, globs and .tar shards; pictures may have any size. A picture's caption is that of its shard
or the .txt of its name beside it, else the prompt that it was sampled with; `caption=` stands for all pictures, and
with `captions=FILE` every picture is scored under every caption, of which the likeliest is its best.

`scores.csv` has a row for each picture and caption, `scores.json` their means too. For each picture, `<name>.png`
shows where in it the nats are, and `<name>.npy` is their grid.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from dalle1.atomic_files import atomic, atomic_directory, check_directory, write_json
from dalle1.cli import OptionError, dashed_options, errors_in_one_line
from dalle1.data.fields import require_int
from dalle1.data.picture_files import PictureFile, find_pictures, printable, unique_names
from dalle1.data.sampled_picture import read_sampled_picture
from dalle1.data.transforms import decode_image, fit_picture, parse_color, to_unit_interval
from dalle1.evaluation.likelihood import TokenNats, token_nats, told_tokens
from dalle1.evaluation.pictures import heat_legend, heat_map, save_picture, to_pictures
from dalle1.picture_grid import GridBlock, draw_page
from dalle1.pipeline import Pipeline, choose_device
from dalle1.results import new_directory
from dalle1.run_models import add_name_argument, choose_models, default_model
from dalle1.sampling.prompts import read_lines
from dalle1.tokenizers.text import TextTokenizer

_MOST_SHOWN = 4  # captions of a picture that are drawn and printed
_MOST_PRINTED = 20  # pictures
_PANEL_SIDE = 240  # pixels; panels are enlarged to it, so that their numbers fit below them,
_LONGEST_PANEL_SIDE = 1024  # but not if their longer side would exceed this
_LEGEND_WIDTH = 360
_ALIGNMENT = ("left", "left", *["right"] * 6)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A picture under a caption: one row in `scores.csv`."""

    name: str  # of the picture's files, without extension
    source: str
    caption: str
    text_nats: float
    text_tokens: int  # the padding token that ends the caption counts too
    text_nats_per_token: float
    image_nats: float
    image_nats_per_token: float
    # Image nats without a caption minus those with it; None if training left out no captions.
    caption_gain_nats: float | None
    # Of the caption given the picture, if all given ones are equally likely before; None if there is only one.
    probability: float | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a run gave."""

    pictures: list[list[Score]]  # for each picture the scores of its captions, in the order of the captions
    failed: dict[str, str]  # source -> what is wrong with it
    interrupted: bool = False  # by Ctrl-C, so that pictures are missing

    @property
    def rows(self) -> list[Score]:
        """All scores."""
        return [score for scores in self.pictures for score in scores]

    @property
    def best(self) -> list[Score]:
        """Each picture under its best caption."""
        return [best_first(scores)[0] for scores in self.pictures]

    def means(self) -> dict[str, float]:
        """Means over pictures, each under its best caption; those per token are over all tokens."""
        names = ("text_nats", "text_tokens", "image_nats", "caption_gain_nats")
        columns = {name: [getattr(score, name) for score in self.best] for name in names}
        means = {name: float(np.mean(values)) for name, values in columns.items() if None not in values}
        text_nats_per_token = means["text_nats"] / means.pop("text_tokens")
        image_nats_per_token = float(np.mean([score.image_nats_per_token for score in self.best]))
        return means | {"text_nats_per_token": text_nats_per_token, "image_nats_per_token": image_nats_per_token}


def best_first(scores: Sequence[Score]) -> list[Score]:
    """Scores of one picture from the caption that makes it likeliest on; equal ones keep their order."""
    return sorted(scores, key=lambda score: score.image_nats)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Captioned:
    """A picture that was read, and the captions that it is scored under."""

    name: str
    source: str
    image_tokens: Int[Tensor, "gh gw"]  # those it was sampled with, if it was
    captions: Sequence[str]
    text_tokens: Int[Tensor, "k t"]


def score_files(
    files: Sequence[PictureFile],
    pipeline: Pipeline,
    out: Path,
    *,
    captions: Sequence[str] | None = None,
    batch_size: int = 16,
    background: str = "white",
) -> Scores:
    """Score pictures and write `<name>.png` and `<name>.npy` of each into `out`.

    Pictures that cannot be read, and those whose own caption is missing or too long, are told on stderr and passed
    over. Ctrl-C leaves those that are done.

    Args:
        files: Undecoded pictures.
        pipeline: The transformer and its dVAE, on the device to compute on.
        out: Directory, made when it is needed.
        captions: Every picture is scored under each of them; without, under its own caption.
        batch_size: Sequences that the transformer computes at once.
        background: What transparent parts of pictures show, a colour as `transforms.parse_color` takes it.

    Raises: ValueError if no picture can be scored, for captions that are empty or too long, for a bad `batch_size` or
        `background`; TypeError if `batch_size` is not whole.
    """
    require_int("batch_size", batch_size, at_least=1)
    parse_color(background)
    if captions is not None and not captions:
        raise ValueError("captions must hold at least one caption, got none; leave them out for each picture's own")
    # Encoded once for all pictures, and checked before the first.
    given = (captions, _tokenizer(pipeline).encode(captions)) if captions is not None else None
    n_sequences = (len(captions) if captions else 1) + _knows_no_caption(pipeline)
    group_size = max(1, batch_size // n_sequences)
    named = list(zip(unique_names(files), files, strict=True))
    pictures: list[list[Score]] = []
    failed: dict[str, str] = {}
    interrupted = False
    try:
        for first in tqdm(range(0, len(named), group_size), unit=" batches", disable=None):
            group = []
            for name, file in named[first : first + group_size]:
                try:
                    group.append(_read(name, file, pipeline, given, background))
                except (OSError, ValueError) as error:
                    source = printable(file.source)
                    failed[source] = (isinstance(error, OSError) and error.strerror) or str(error)
                    tqdm.write(f"cannot score '{source}': {failed[source]}", file=sys.stderr)
            if group:
                pictures += _score(group, pipeline, out, batch_size=batch_size)
    except KeyboardInterrupt:
        if not pictures:
            raise
        interrupted = True
    if not pictures:
        raise ValueError(f"at least one picture must be good, got {len(failed)} that cannot be scored")
    return Scores(pictures=pictures, failed=failed, interrupted=interrupted)


def _tokenizer(pipeline: Pipeline) -> TextTokenizer:
    tokenizer = pipeline.transformer.text_tokenizer
    assert tokenizer is not None, "the pipeline has checked it"
    return tokenizer


def _knows_no_caption(pipeline: Pipeline) -> bool:
    """Whether the transformer has seen pictures without a caption in training."""
    return pipeline.transformer.caption_dropout > 0


def _read(
    name: str,
    file: PictureFile,
    pipeline: Pipeline,
    given: tuple[Sequence[str], Int[Tensor, "k t"]] | None,
    background: str,
) -> _Captioned:
    data = file.read()
    picture, sampled = decode_image(data, background), read_sampled_picture(data)
    if given is None:
        caption = file.read_caption()
        caption = sampled.prompt if caption is None and sampled else caption
        if caption is None:
            raise ValueError("it has no caption; give caption=..., or write one into a .txt file of its name")
        given = [caption], _tokenizer(pipeline).encode([caption])
    config, image_tokenizer = pipeline.transformer.model.config, pipeline.image_tokenizer
    grid, factor = (config.grid_height, config.grid_width), image_tokenizer.dvae.config.downsampling
    image_tokens = None
    if sampled:
        vocab_size = image_tokenizer.vocab_size
        image_tokens = sampled.tokens_of(image_tokenizer.sha256, grid=grid, vocab_size=vocab_size)
    if image_tokens is None:
        pixels = fit_picture(picture, grid[0] * factor, grid[1] * factor)
        image_tokens = image_tokenizer.encode(to_unit_interval(pixels)[None].to(pipeline.device))[0].cpu()
    captions, text_tokens = given
    return _Captioned(
        name=name,
        source=printable(file.source),
        image_tokens=image_tokens,
        captions=captions,
        text_tokens=text_tokens,
    )


def _score(group: Sequence[_Captioned], pipeline: Pipeline, out: Path, *, batch_size: int) -> Iterator[list[Score]]:
    """Score pictures with the same number of captions each, and write their files."""
    transformer, image_tokenizer = pipeline.transformer.model, pipeline.image_tokenizer
    image_tokens = torch.stack([item.image_tokens for item in group])
    text_tokens = torch.stack([item.text_tokens for item in group])  # (pictures, captions, t)
    if _knows_no_caption(pipeline):
        nothing = transformer.empty_text().cpu().expand(len(group), 1, -1)
        text_tokens = torch.cat([text_tokens, nothing], dim=1)
    n = text_tokens.shape[1]
    nats = token_nats(
        transformer, text_tokens.flatten(0, 1), image_tokens.repeat_interleave(n, dim=0), batch_size=batch_size
    )
    for i, item in enumerate(group):
        # Of its captions, and last of none.
        own = nats[i * n : (i + 1) * n]
        scores = _rows(item, own, told_tokens(item.text_tokens, transformer.config.text_vocab_size).sum(1).tolist())
        seen = to_pictures(image_tokenizer.decode(image_tokens[i, None].to(pipeline.device)))[0]
        save_picture(_draw(scores, own.image, seen, transformer.config.image_vocab_size), out / f"{item.name}.png")
        grids = own.image[: len(scores)] if len(scores) > 1 else own.image[0]
        with atomic(out / f"{item.name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, grids.numpy())
        yield scores


def _rows(item: _Captioned, nats: TokenNats, n_text_tokens: Sequence[int]) -> list[Score]:
    """A picture under its captions; `nats` has one entry more if it could be scored without any."""
    text_nats, image_nats = nats.text.double().sum(1).tolist(), nats.image.double().sum((1, 2))
    n = len(item.captions)
    probabilities = torch.softmax(-image_nats[:n], dim=0).tolist() if n > 1 else [None]
    gains = (image_nats[-1] - image_nats[:n]).tolist() if len(image_nats) > n else [None] * n
    return [
        Score(
            name=item.name,
            source=item.source,
            caption=item.captions[i],
            text_nats=text_nats[i],
            text_tokens=n_text_tokens[i],
            text_nats_per_token=text_nats[i] / n_text_tokens[i],
            image_nats=float(image_nats[i]),
            image_nats_per_token=float(image_nats[i]) / nats.image[i].numel(),
            caption_gain_nats=gains[i],
            probability=probabilities[i],
        )
        for i in range(n)
    ]


def _draw(
    scores: Sequence[Score], nats: Float[Tensor, "s gh gw"], seen: Image.Image, image_vocab_size: int
) -> Image.Image:
    """A page with the picture and its nats under the best captions and, where that is known, without any."""
    shorter, longer = sorted(seen.size)
    factor = max(1, min(math.ceil(_PANEL_SIDE / shorter), _LONGEST_PANEL_SIDE // longer))
    pixels_per_token = factor * seen.width // nats.shape[2]
    # The same colours for all pictures and runs.
    highest = math.log(image_vocab_size)

    def heat(i: int) -> Image.Image:
        return heat_map(nats[i], highest=highest, pixels_per_value=pixels_per_token)

    picture = seen.resize((factor * seen.width, factor * seen.height), Image.Resampling.NEAREST)
    shown = best_first(scores)[:_MOST_SHOWN]
    legend = heat_legend(
        "0 nats, certain", f"{highest:.1f} or more, a guess among {image_vocab_size} codes", width=_LEGEND_WIDTH
    )
    blocks = []
    for score in shown:
        pictures = [picture, heat(scores.index(score))]
        captions = [
            f"text {score.text_nats:.1f} nats, {score.text_nats_per_token:.3f} per token",
            f"image {score.image_nats:.1f} nats, {score.image_nats_per_token:.3f} per token",
        ]
        if score.caption_gain_nats is not None:
            pictures.append(heat(-1))
            without = score.image_nats + score.caption_gain_nats
            captions.append(f"without caption {without:.1f} nats, {score.caption_gain_nats:+.1f}")
        share = "" if score.probability is None else f"{score.probability:.1%}: "
        blocks.append(
            GridBlock(
                title=share + score.caption,
                pictures=pictures,
                captions=captions,
                columns=len(pictures),
                legend=legend if score is shown[-1] else None,
            )
        )
    return draw_page(blocks)


def write_scores(
    scores: Scores, out: Path, *, settings: dict[str, Any], checkpoints: dict[str, dict[str, Any]]
) -> None:
    """Write `scores.csv`, a row for each picture and caption, and `scores.json` with all that was found."""
    names = [field.name for field in fields(Score)]
    with atomic(out / "scores.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(score) for score in scores.rows)
    content = {
        "settings": settings,
        "checkpoints": checkpoints,
        "means": scores.means(),
        "best_captions": {score.source: score.caption for score in scores.best},
        "failed": scores.failed,
        "interrupted": scores.interrupted,
        "rows": [asdict(score) for score in scores.rows],
    }
    write_json(out / "scores.json", content)


def format_scores(scores: Scores) -> str:
    """The table that the command prints: of each picture its captions, best first, of many the best."""
    several = len(scores.pictures[0]) > 1
    rows = []
    for picture in scores.pictures[:_MOST_PRINTED]:
        for place, score in enumerate(best_first(picture)[:_MOST_SHOWN]):
            numbers = [score.text_nats, score.text_nats_per_token, score.image_nats, score.image_nats_per_token]
            row = [
                score.source if place == 0 else "",
                textwrap.shorten(score.caption, 50, placeholder="..."),
                *numbers,
                score.caption_gain_nats,
            ]
            rows.append([*row, score.probability])
    if len(scores.pictures) > _MOST_PRINTED:
        rows.append([f"... and {len(scores.pictures) - _MOST_PRINTED} more, in scores.csv", *[None] * 7])
    means = scores.means()
    columns = ("text_nats", "text_nats_per_token", "image_nats", "image_nats_per_token", "caption_gain_nats")
    label = "their best captions" if several else ""
    rows.append([f"mean of {len(scores.pictures)}", label, *(means.get(name) for name in columns), None])
    headers = ["picture", "caption", "text nats", "/token", "image nats", "/token", "caption gain", "probability"]
    forms = ["", "", ".1f", ".3f", ".1f", ".4f", ".1f", ".1%"]
    # Columns that no picture of this run has are left out.
    kept = [i for i in range(len(headers)) if any(row[i] is not None for row in rows)]
    cells = [["" if row[i] is None else format(row[i], forms[i]) for i in kept] for row in rows]
    table = tabulate(cells, headers=[headers[i] for i in kept], disable_numparse=True, colalign=_ALIGNMENT[: len(kept)])
    failed = f"\n{len(scores.failed)} could not be scored" if scores.failed else ""
    return f"{table}{failed}"


def _given_captions(caption: str | None, captions: str | None) -> list[str] | None:
    """The captions that all pictures are scored under, each once; None if each has its own."""
    if caption is not None and captions is not None:
        raise OptionError("give either caption=... or captions=FILE, got both")
    if caption is not None:
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"caption must be valid Unicode, got {caption!r}") from error
        return [caption.strip()]
    if captions is None:
        return None
    # The same caption twice would share its probability with itself.
    return list(dict.fromkeys(read_lines(captions, option="captions", each="caption")))


@errors_in_one_line()
def main() -> None:
    """Command line; exit code 1 if a picture could not be scored."""
    parser = argparse.ArgumentParser(
        prog="python -m dalle1.score",
        description=__doc__,
        epilog="Options may also be written without dashes: transformer=PATH.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs, .tar shards")
    add_name_argument(parser)
    parser.add_argument("--transformer", metavar="PATH", help=f"(default: {default_model('transformer')})")
    parser.add_argument(
        "--dvae", metavar="PATH", help=f"what the transformer was trained with (default: {default_model('dvae')})"
    )
    parser.add_argument("--caption", help="the caption of all pictures")
    parser.add_argument("--captions", metavar="FILE", help="score every picture under every line of this file")
    parser.add_argument("--out", help="directory to write to (default: runs/scores/<name>-<time>)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences computed at once (default: %(default)s)")
    parser.add_argument("--background", default="white", help="what transparent parts show (default: %(default)s)")
    names = ("name", "transformer", "dvae", "caption", "captions", "out", "device", "batch_size", "background")
    options = parser.parse_intermixed_args(dashed_options(sys.argv[1:], names))
    choose_models(options, transformer="transformer", dvae="dvae")
    captions = _given_captions(options.caption, options.captions)
    files = find_pictures(options.images)
    device = choose_device(options.device)
    name = f"{len(files)}-pictures" if len(files) > 1 else next(unique_names(files))
    out = check_directory(options.out) if options.out else new_directory("runs/scores", name)
    pipeline = Pipeline.from_checkpoint(transformer=options.transformer, dvae=options.dvae).to(device)
    how: dict[str, Any] = {"batch_size": options.batch_size, "background": options.background}
    with atomic_directory(out) as partial:
        scores = score_files(files, pipeline, partial, captions=captions, **how)
        settings = {name: getattr(options, name) for name in ("transformer", "dvae", "caption", "captions")} | how
        write_scores(scores, partial, settings=settings, checkpoints=pipeline.checkpoints)
    print(format_scores(scores))
    print(f"pictures: {out}")
    print(f"numbers:  {out / 'scores.csv'}")
    if scores.interrupted:
        print("interrupted: these are the pictures that were done", file=sys.stderr)
        raise SystemExit(130)
    if scores.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
