"""Pictures that were sampled for captions: found in a directory, or sampled into one, by one process or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dalle1.data.sampled_picture import MANIFEST_NAME
from dalle1.decode_and_rank import PromptResult
from dalle1.evaluation.picture_sets import PictureSet, open_pictures
from dalle1.evaluation.ranks import Ranks
from dalle1.pipeline import Pipeline
from dalle1.results import Choice, RunPart, SampleRun
from dalle1.run_origin import RunOrigin
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.progress import ProgressBar

BEST_OF_KEY = "best_of"  # in a run's settings: of how many of the first candidates it has the best


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledSet:
    """One picture for each caption, the best of its candidates; and perhaps the best of the first few."""

    best: PictureSet
    facts: Mapping[str, Any]  # plain types
    run: SampleRun | None = None  # None for pictures of others

    def best_of(self, n: int) -> PictureSet:
        """Of each prompt the best of its first n candidates.

        Raises: ValueError if the directory cannot tell which these are.
        """
        if self.run is None:
            raise ValueError("best_of needs samples of sample.py, whose manifest.json has scores, got other pictures")
        names = []
        kept, best_of = self.run.settings.get("keep"), self.run.settings.get(BEST_OF_KEY)
        for entry in self.run.entries:
            pictures = entry["pictures"]
            if n > entry["sampled"]:
                raise ValueError(f"best_of must be at most the number of candidates, {entry['sampled']}, got {n}")
            if n < entry["sampled"] and (kept is not None or (best_of is not None and n not in best_of)):
                raise ValueError(
                    f"best_of={n} needs all candidates of '{self.run.directory}', it keeps "
                    f"{len(pictures)} of {entry['sampled']}; rank them again without keep"
                )
            if n > 1 and any(picture["score"] is None for picture in pictures):
                raise ValueError(
                    f"best_of={n} needs scores, '{self.run.directory}' has none; rank it with sample.py rerank.only=..."
                )
            # Best first, where there are scores.
            names.append(next(picture["file"] for picture in pictures if picture["candidate"] < n))
        return _of_files(self.run, names)


def open_samples(place: str, *, caption: str | None = None) -> SampledSet:
    """A directory of sample.py, or any folder, shards or table of pictures with captions.

    `caption` says where captions stand, as `PictureSet` takes it; a directory of sample.py knows its prompts.

    Raises: ValueError if a run is not complete, or lies deeper in the folders, or for a `caption` that is not needed;
        OSError or ValueError as `open_pictures`.
    """
    directory = Path(place)
    if not (directory / MANIFEST_NAME).is_file():
        pictures = open_pictures([place], caption=caption or "text")
        # All pictures of a run would count, where the best of each prompt was meant.
        for folder in {Path(sample.container, sample.key).parent for sample in pictures.samples}:
            if (folder / MANIFEST_NAME).is_file():
                raise ValueError(f"samples must be a directory of sample.py itself, got {place!r}; give '{folder}'")
        return SampledSet(best=pictures, facts=pictures.facts)
    if caption is not None:
        raise ValueError(f"caption says where captions stand, {place!r} has prompts in {MANIFEST_NAME}; leave it out")
    run = SampleRun.reopen(directory)
    if not run.is_complete or len(run.entries) != len(run.origin.prompts):
        raise ValueError(
            f"'{place}' must be a complete run of sampling, it is not; go on with the command that made it"
        )
    best = _of_files(run, [entry["pictures"][0]["file"] for entry in run.entries])
    return SampledSet(best=best, facts=best.facts | {"run": run.facts}, run=run)


def _of_files(run: SampleRun, names: Sequence[str]) -> PictureSet:
    by_key = {sample.key: sample for sample in open_pictures([str(run.directory)]).samples}
    if missing := [name for name in names if name not in by_key]:
        raise ValueError(f"'{run.directory}' must have all pictures of its {MANIFEST_NAME}, it lacks {missing[0]!r}")
    return PictureSet([by_key[name] for name in names], captions=[entry["prompt"] for entry in run.entries])


def sample_pictures(
    directory: Path | None,
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    candidates: int,
    best_of: Sequence[int],
    seed: int,
    sampling: SamplingConfig,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    ranks: Ranks,
) -> SampledSet:
    """Sample pictures of all prompts into a directory of `sample.py`'s form without grids; what is there stays.

    Each process samples every `world_size`-th prompt. A picture depends on its prompt and the seed, not on who samples
    it. Of each prompt the best of all candidates is written, and the best of the first n for each n in `best_of`.

    Args:
        directory: Where to; None for one that is called after the origin.
        pipeline: On the device of this process.
        prompts: Different from each other.
        candidates: Of each prompt.
        best_of: Numbers of candidates, each at most `candidates`.
        seed: Of the samples.
        sampling: Temperature and guidance.
        dtype: Of decoding.
        settings: For the manifest, in plain types.
        ranks: The processes that share the work.

    Raises: ValueError if `best_of` needs a reranker or more candidates; FileExistsError if the directory holds
        something else; what `Pipeline.stream` raises.
    """
    counts = sorted({*best_of, candidates})
    if counts[0] < 1 or counts[-1] > candidates:
        raise ValueError(f"best_of must be numbers in [1, {candidates}], the candidates, got {sorted(best_of)}")
    if candidates > 1 and pipeline.reranker is None:
        raise ValueError(f"the best of {candidates} candidates needs a reranker, got none; set candidates=1")
    prompts = pipeline.check_prompts(prompts)
    what: dict[str, Any] = {"seed": seed, "sampling": sampling, "negative_prompt": None, "image_prompt": None}
    origin = RunOrigin.of(pipeline, prompts, **what, dtype=dtype)
    place = directory or Path("runs/evaluations/samples") / origin.name
    reranker = dict(pipeline.reranker.facts) if pipeline.reranker else None
    choice = Choice(sampled=candidates, keep=counts, reranker=reranker, paste_kept=False)
    try:
        run = SampleRun.open(place, origin, checkpoints=pipeline.checkpoints)
    except FileExistsError as error:
        raise FileExistsError(f"sample_dir must be free, or hold these very samples: {error}") from error
    is_done = run.is_complete and all(run.find_written(number, choice) for number in range(len(prompts)))
    ranks.wait()  # until all have looked, before the first one writes
    if is_done:
        return open_samples(str(place))
    if ranks.is_first:
        run.begin()
    ranks.wait()
    missing = [number for number in ranks.share(len(prompts)) if not run.find_written(number, choice)]
    with ProgressBar() as bar:
        results = pipeline.stream(
            [prompts[number] for number in missing or [0]],  # arguments are checked in any case
            candidates=candidates,
            dtype=dtype,
            store=RunPart(run, missing or [0]),
            on_progress=bar.sampled if ranks.is_first else None,
            on_finished=bar.finished if ranks.is_first else None,
            **what,
        )
        for number, result in zip(missing, results, strict=False):
            run.write(number, best_of_prefixes(result, counts), choice)
    ranks.wait()
    if ranks.is_first:
        for number in range(len(prompts)):
            assert run.find_written(number, choice), "some process has written it"
        settings = {**settings, BEST_OF_KEY: counts}
        run.finish(settings=settings, reranker=reranker, complete=True, with_grids=False)
    ranks.wait()
    return open_samples(str(place))


def best_of_prefixes(result: PromptResult, counts: Sequence[int]) -> PromptResult:
    """Of a prompt's candidates, best first, those that are the best of the first n for an n in `counts`."""
    best = {next(i for i, candidate in enumerate(result.candidates) if candidate < n) for n in counts}
    rows = sorted(best)
    return PromptResult(
        prompt=result.prompt,
        images=result.images[rows],
        image_tokens=result.image_tokens[rows],
        candidates=[result.candidates[i] for i in rows],
        scores=None if result.scores is None else [result.scores[i] for i in rows],
        sampled=result.sampled,
    )
