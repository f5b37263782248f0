"""How good sampled pictures are: FID, KID, inception score, precision, recall, CLIP score, prompt accuracy.

`python -m dalle1.evaluate system REFERENCE... [samples=DIR]`. REFERENCE are tar shards, folders, tables and globs of
these. Without `samples`, a transformer samples pictures for their captions first, into a directory of sample.py's
form. A command that was interrupted goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle1.atomic_files import atomic_directory
from dalle1.checkpoint import Loaded, load_image_tokenizer, load_transformer
from dalle1.data import shapes
from dalle1.data.fields import require_int
from dalle1.evaluation.chunks import Chunks, compute_chunks
from dalle1.evaluation.command import (
    FILE_NAME,
    add_shared_arguments,
    choose_out,
    load_extractors,
    print_numbers,
    write_evaluation,
)
from dalle1.evaluation.curves import draw_best_of
from dalle1.evaluation.extractors import Extractor
from dalle1.evaluation.feature_sets import (
    FeatureSet,
    Numbers,
    caption_score,
    class_score,
    compare,
    extract,
    read_captions,
)
from dalle1.evaluation.picture_sets import PictureSet, Treatment, open_pictures, parse_size
from dalle1.evaluation.pictures import save_picture
from dalle1.evaluation.ranks import Ranks, joined_ranks
from dalle1.evaluation.readable_pictures import add_bad_sample_argument, readable
from dalle1.evaluation.sampled_sets import BEST_OF_KEY, SampledSet, open_samples, sample_pictures
from dalle1.evaluation.shapes_scorer import score
from dalle1.models.transformer import DalleTransformer
from dalle1.pipeline import Pipeline, choose_dtype
from dalle1.rerank.choose import load_reranker
from dalle1.run_models import choose_models, default_model
from dalle1.sampling.filters import SamplingConfig

# Options that say how to sample, and what they are if nothing is said.
_SAMPLING = {
    "transformer": None,  # the run's, as the next two
    "dvae": None,
    "reranker": None,
    "prompts": None,
    "candidates": 1,
    "temperature": 1.0,  # the paper's
    "guidance_scale": None,
    "sample_dir": None,
}
_SMALLEST_SCENE = 16  # pixels, of the shapes scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate system`."""
    parser.add_argument("reference", nargs="+", metavar="REFERENCE", help="captioned pictures to compare with")
    parser.add_argument("--samples", help="a directory of sample.py, or pictures with captions; else some are sampled")
    parser.add_argument(
        "--caption",
        help="where captions of samples, else of the reference, stand: text, lines or json:FIELD",
    )
    defaults = _SAMPLING
    parser.add_argument("--transformer", help=f"(default: {default_model('transformer')})")
    parser.add_argument("--dvae", help=f"what it was trained with (default: {default_model('dvae')})")
    parser.add_argument(
        "--reranker",
        help="of several candidates: clip:CHECKPOINT, hf_clip:NAME_OR_DIR, image_likelihood, caption_likelihood, none "
        f"(default: clip:{default_model('clip')})",
    )
    parser.add_argument("--prompts", type=int, help="different captions, drawn by seed (default: all)")
    parser.add_argument("--candidates", type=int, help=f"of each caption (default: {defaults['candidates']})")
    parser.add_argument("--temperature", type=float, help=f"of sampling (default: {defaults['temperature']})")
    parser.add_argument("--guidance_scale", type=float, help="of sampling (default: what sample.py takes)")
    parser.add_argument("--sample_dir", type=Path, help="for the samples (default: runs/evaluations/samples/<origin>)")
    parser.add_argument("--blur", default="0", help="radii of Gaussian filters on both sides; the paper's: 0,1,2,4,8")
    parser.add_argument("--best_of", help="candidates, such as 1,2,4,8: numbers against how many the best is of")
    parser.add_argument("--without", type=Path, help="JSON whose `keys` are reference pictures to leave out as well")
    add_bad_sample_argument(parser, pictures="reference pictures")
    add_shared_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, write and print. Raises: ValueError, TypeError or OSError with one sentence for what cannot be done."""
    radii = [Treatment(blur=_number("blur", part, float)).blur for part in options.blur.split(",")]
    best_of = [] if options.best_of is None else [_number("best_of", part, int) for part in options.best_of.split(",")]
    out = choose_out(options)
    reference = open_pictures(options.reference, caption=options.caption or "text", on_bad_sample=options.on_bad_sample)
    without = None if options.without is None else _read_keys(options.without)
    extractors = load_extractors(options, classes=True)
    with joined_ranks() as ranks:
        device = ranks.choose_device(options.device)
        reference, skipped = readable(reference, cache=options.cache, ranks=ranks, label="reference pictures")
        rows = None if without is None else reference.rows_without(without)
        samples = _samples(options, reference, best_of, device, ranks)
        chosen = {n: samples.best_of(n) for n in best_of}
        treatment = Treatment(size=_size(options, samples.best))
        for extractor in extractors:
            extractor.to(device)
        measured = _Measured(extractors, treatment, reference, cache=options.cache, ranks=ranks, seed=options.seed)
        # All processes come by here; only the first one computes what follows.
        whole = [measured.prepare(samples.best, radius) for radius in radii]
        curve = {n: measured.prepare(best, 0.0, tag=f"best_of={n}") for n, best in chosen.items()}
        if not ranks.is_first:
            return
        numbers = Numbers(values={}, notes=skipped)
        for prepared in whole:
            numbers |= measured.numbers(prepared)
            numbers |= measured.distances(prepared, rows) if rows is not None else Numbers(values={}, notes=[])
        points = {n: measured.numbers(prepared) for n, prepared in curve.items()}
        with atomic_directory(out) as directory:
            write_evaluation(
                directory,
                numbers,
                options=options,
                extractors=extractors,
                sets={"reference": reference.facts, "samples": dict(samples.facts)},
                more={
                    "treatment": treatment.facts,
                    BEST_OF_KEY: [{"n": n, "numbers": point.values} for n, point in points.items()],
                },
            )
            if points:
                curves = draw_best_of({n: point.values for n, point in points.items()})
                save_picture(curves, directory / "best_of.png")
    for point in points.values():
        numbers |= point
    print_numbers(numbers)
    print(f"numbers: {out / FILE_NAME}" + (f"\npicture: {out / 'best_of.png'}" if points else ""))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """Samples whose features are there, and those of the reference under the same treatment."""

    samples: PictureSet
    pairs: list[tuple[Extractor, FeatureSet, FeatureSet]]
    right: Chunks | None  # by the shapes scorer
    tag: str


class _Measured:
    """What all sets of samples are measured with."""

    def __init__(
        self,
        extractors: Sequence[Extractor],
        treatment: Treatment,
        reference: PictureSet,
        *,
        cache: Path,
        ranks: Ranks,
        seed: int,
    ) -> None:
        self._extractors, self._size, self._reference, self._seed = extractors, treatment.size, reference, seed
        self._where: dict[str, Any] = {"cache": cache, "ranks": ranks}
        self._references: dict[tuple[str, float], FeatureSet] = {}  # all samples are compared with the same
        # Of each extractor; captions are the same for all samples.
        self._texts: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}

    def prepare(self, samples: PictureSet, blur: float, *, tag: str = "") -> _Prepared:
        """Have all that takes long computed, by all processes."""
        treatment = Treatment(size=self._size, blur=blur)
        pairs = []
        for extractor in self._extractors:
            words = f"{extractor.name}, blur {blur:g}" + (f", {tag}" if tag else "")
            place = (extractor.name, blur)
            if place not in self._references:
                self._references[place] = extract(
                    self._reference, extractor, treatment, **self._where, label=f"{words}, reference"
                )
            features = extract(samples, extractor, treatment, **self._where, label=f"{words}, samples")
            pairs.append((extractor, self._references[place], features))
        right = None if blur else _score_scenes(samples, treatment, **self._where)
        return _Prepared(samples=samples, pairs=pairs, right=right, tag=tag)

    def distances(self, prepared: _Prepared, rows: Sequence[int] | None) -> Numbers:
        """Of the samples from the reference, or from some of its pictures."""
        numbers = Numbers(values={}, notes=[])
        for _, reference, samples in prepared.pairs:
            numbers |= compare(reference, samples, rows=rows, seed=self._seed, tag=prepared.tag)
        return numbers

    def numbers(self, prepared: _Prepared) -> Numbers:
        """All that is known of the samples."""
        numbers = self.distances(prepared, None)
        for extractor, _, samples in prepared.pairs:
            numbers |= class_score(samples, tag=prepared.tag)
            if extractor.reads_text:
                numbers |= self._caption_score(prepared, extractor, samples)
        if prepared.right is not None:
            right = prepared.right.load(["right"])["right"].double()
            what = f"shapes_scorer,n={len(right)}" + (f",{prepared.tag}" if prepared.tag else "")
            numbers |= Numbers(values={f"prompt_accuracy[{what}]": float(right.mean())}, notes=[])
        return numbers

    def _caption_score(self, prepared: _Prepared, extractor: Extractor, samples: FeatureSet) -> Numbers:
        try:
            captions = prepared.samples.captions
        except ValueError as error:
            return Numbers(values={}, notes=[f"the CLIP score of {extractor.name} is left out: {error}"])
        if extractor.name not in self._texts:
            self._texts[extractor.name] = read_captions(captions, extractor)
        return caption_score(samples, captions, *self._texts[extractor.name], tag=prepared.tag)


def _score_scenes(samples: PictureSet, treatment: Treatment, *, cache: Path, ranks: Ranks) -> Chunks | None:
    """Whether each picture shows what its caption says; None if captions are not of the generated scenes."""
    size = treatment.size
    if size is None or size[0] != size[1] or size[0] < _SMALLEST_SCENE:
        return None
    try:
        captions = samples.captions
        for caption in captions:
            shapes.parse(caption)
    except ValueError:
        return None

    def compute(numbers: range) -> dict[str, Tensor]:
        (pictures,) = samples.decoded(numbers, treatment, at_once=len(numbers))
        pairs = zip(pictures, (captions[i] for i in numbers), strict=True)
        right = [score(np.ascontiguousarray(picture.permute(1, 2, 0)), caption).right for picture, caption in pairs]
        return {"right": torch.tensor(right)}

    recipe = {"what": "shapes scorer", "pictures": samples.sha256, "captions": captions, "treatment": treatment.facts}
    return compute_chunks(compute, len(samples), recipe=recipe, cache=cache, ranks=ranks, label="prompt accuracy")


def _samples(
    options: argparse.Namespace, reference: PictureSet, best_of: Sequence[int], device: torch.device, ranks: Ranks
) -> SampledSet:
    if options.samples is not None:
        for name in _SAMPLING:
            if getattr(options, name) is not None:
                raise ValueError(f"{name} says how to sample, leave it out with samples={options.samples}")
        return open_samples(options.samples, caption=options.caption)
    asked_for = options.reranker
    for name, value in _SAMPLING.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    choose_models(options, transformer="transformer", dvae="dvae")
    if options.reranker is None:
        options.reranker = f"clip:{default_model('clip', options.name)}"
    require_int("candidates", options.candidates, at_least=1)
    if options.candidates == 1 and asked_for not in (None, "none"):
        raise ValueError("reranker chooses among several candidates, got candidates=1; set more, or leave it out")
    pipeline = _load_pipeline(options).to(device)
    scale = pipeline.default_guidance_scale if options.guidance_scale is None else options.guidance_scale
    sampling = SamplingConfig(temperature=options.temperature, guidance_scale=scale)
    kind, _, model = options.reranker.partition(":")
    return sample_pictures(
        options.sample_dir,
        pipeline,
        draw_captions(reference.captions, options.prompts, seed=options.seed),
        candidates=options.candidates,
        best_of=best_of,
        seed=options.seed,
        sampling=sampling,
        dtype=choose_dtype("auto", device),
        settings={
            "transformer": options.transformer,
            "dvae": options.dvae,
            "candidates": options.candidates,
            "temperature": options.temperature,
            "guidance_scale": scale,
            "seed": options.seed,
            "rerank": {"kind": kind, "model": model or None} if options.candidates > 1 else {"kind": "none"},
        },
        ranks=ranks,
    )


def _load_pipeline(options: argparse.Namespace) -> Pipeline:
    @cache
    def transformer() -> Loaded[DalleTransformer]:
        return load_transformer(options.transformer)

    image_tokenizer = load_image_tokenizer(options.dvae)
    reranker = None
    if options.candidates > 1:  # of one there is nothing to choose
        kind, _, model = options.reranker.partition(":")
        reranker = load_reranker(
            kind, model=model or None, allow_download=options.allow_download, load_transformer=transformer
        )
    return Pipeline(transformer(), image_tokenizer, reranker)


def draw_captions(captions: Sequence[str], count: int | None, *, seed: int) -> list[str]:
    """`count` different captions drawn at random, in their order; all different ones without a `count`.

    Raises: ValueError if there are fewer, or `count` < 1.
    """
    distinct = list(dict.fromkeys(caption.strip() for caption in captions))
    if count is None:
        return distinct
    require_int("prompts", count, at_least=1)
    if count > len(distinct):
        raise ValueError(f"prompts must be at most the number of different captions, {len(distinct)}, got {count}")
    drawn = np.random.default_rng(seed).choice(len(distinct), count, replace=False)
    return [distinct[i] for i in sorted(drawn.tolist())]


def _size(options: argparse.Namespace, samples: PictureSet) -> tuple[int, int]:
    """What all pictures are made to: the size that was asked for, else that of the first sample."""
    if options.size is not None:
        return parse_size(options.size)
    [[first]] = samples.decoded(range(1), Treatment(), at_once=1)
    return int(first.shape[1]), int(first.shape[2])


def _read_keys(path: Path) -> list[str]:
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))["keys"]
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' must be JSON with a list `keys`, it cannot be read so ({error!r})") from error
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"'{path}' must have keys of pictures as texts in its list `keys`, got {str(keys)[:60]}")
    return keys


def _number(name: str, text: str, kind: type[Any]) -> Any:
    try:
        number = kind(text)
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between them, got {text!r}") from error
    if kind is int:
        require_int(name, number, at_least=1)
    return number
