"""From a request to its pictures: what is told while they are sampled, and the directory they are written to."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from dalle1.data.fields import require_bool, require_int
from dalle1.evaluation.pictures import to_pictures
from dalle1.html_page import embed
from dalle1.pipeline import Pipeline
from dalle1.preview import draw_so_far
from dalle1.results import Choice, SampleRun
from dalle1.run_origin import RunOrigin
from dalle1.sampling.image_prompt import ImagePrompt
from dalle1.sampling.progress import Progress
from dalle1.web.asked import Asked
from dalle1.web.jobs import Job
from dalle1.web.kept import Kept, Result, Upload

_PROGRESS_SECONDS = 0.1  # between two reports; nobody reads faster


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the page decodes, as sample.py's options of these names do."""

    dtype: torch.dtype
    batch_size: int | Literal["auto"] = "auto"
    compiled: bool = False
    # Share of the time that may go into showing pictures that are not finished: 0 shows none, 1 every row of tokens.
    preview_share: float = 0.25

    def __post_init__(self) -> None:
        require_bool("compile", self.compiled)
        if self.batch_size != "auto":
            require_int("batch_size", self.batch_size, at_least=1)
        share = self.preview_share
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(f"preview_share must be a number in [0, 1], got {share!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"preview_share must be in [0, 1], got {share}")


class Studio:
    """Does requests, one after the other."""

    def __init__(self, pipeline: Pipeline, kept: Kept, decoding: Decoding, settings: Mapping[str, Any]) -> None:
        """Results go to `kept`; `settings` are what manifests say of all requests, options of sample.py."""
        self._pipeline, self._kept, self._decoding = pipeline, kept, decoding
        self._settings = dict(settings)

    def work(self, asked: Asked, upload: Upload | None, job: Job) -> None:
        """Sample, rank and write; tells `progress`, `preview` and, at the end, `done` with the pictures.

        Raises: CancelledError as soon as nobody waits for the job; ValueError or OSError for what goes wrong.
        """
        directory = self._kept.new_directory()
        try:
            self._write(directory, asked, upload, job)
        except BaseException as error:
            shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, torch.OutOfMemoryError):
                sentence = "the device's memory is not enough for this request; ask for fewer candidates"
                raise ValueError(sentence) from error
            raise
        job.tell("done", describe_result(*self._kept.add_result(directory)))

    def _write(self, directory: Path, asked: Asked, upload: Upload | None, job: Job) -> None:
        pipeline = self._pipeline
        image_prompt = None if upload is None else self._image_prompt(asked, upload)
        decides: dict[str, Any] = {
            "seed": asked.seed,
            "sampling": asked.sampling,
            "negative_prompt": asked.negative_prompt,
            "image_prompt": image_prompt,
            "dtype": self._decoding.dtype,
        }
        origin = RunOrigin.of(pipeline, [asked.prompt], **decides)
        run = SampleRun.open(directory, origin, checkpoints=pipeline.checkpoints, image_prompt=image_prompt)
        told = _Told(pipeline, job, image_prompt, self._decoding.preview_share)
        (result,) = pipeline.stream(
            [asked.prompt],
            candidates=asked.candidates,
            keep=asked.keep,
            batch_size=self._decoding.batch_size,
            compiled=self._decoding.compiled,
            store=run,
            on_progress=told.sampled,
            on_finished=told.finished,
            **decides,
        )
        job.check()
        facts = dict(pipeline.reranker.facts) if pipeline.reranker else None
        choice = Choice(sampled=result.sampled, keep=asked.keep, reranker=facts, paste_kept=asked.paste_kept)
        run.write(0, result, choice)
        run.finish(settings=self._settings | asked.settings, reranker=facts, complete=True)

    def _image_prompt(self, asked: Asked, upload: Upload) -> ImagePrompt:
        assert asked.again is not None, "it comes with a picture"
        mask = Image.fromarray(asked.again.numpy().astype("uint8") * 255)
        return self._pipeline.image_prompt(
            upload.picture, mask=mask, paste_kept=asked.paste_kept, sampled=upload.sampled
        )


class _Told:
    """What a request tells while it is worked on."""

    def __init__(self, pipeline: Pipeline, job: Job, image_prompt: ImagePrompt | None, preview_share: float) -> None:
        self._pipeline, self._job, self._share = pipeline, job, preview_share
        self._given = None if image_prompt is None else image_prompt.given.to(pipeline.device)
        self._start = time.monotonic()
        self._next_progress = self._next_preview = self._start

    def sampled(self, progress: Progress) -> None:
        """After each decoding step."""
        self._job.check()
        now = time.monotonic()
        if now >= self._next_progress or progress.tokens_done == progress.tokens:
            self._next_progress = now + _PROGRESS_SECONDS
            seconds = max(now - self._start, 1e-9)
            self._job.tell(
                "progress",
                {
                    "phase": "sampling",
                    "done": progress.tokens_done,
                    "total": progress.tokens,
                    "per_second": progress.tokens_done / seconds,
                    "seconds_left": (progress.tokens - progress.tokens_done) * seconds / progress.tokens_done,
                },
            )
        is_row = progress.positions_done % progress.block.image_tokens.shape[-1] == 0
        if self._share and is_row and now >= self._next_preview:
            self._preview(progress)
            took = time.monotonic() - now
            self._next_preview = now + took / self._share

    def _preview(self, progress: Progress) -> None:
        pictures = []
        candidates = progress.block.candidates
        for candidate, tokens in zip(candidates, progress.block.image_tokens[0], strict=True):
            self._job.check()
            known = tokens if self._given is None else torch.where(tokens < 0, self._given, tokens)
            (picture,) = to_pictures(draw_so_far(known, self._pipeline.image_tokenizer))
            pictures.append({"candidate": candidate, "uri": embed(picture)["uri"]})
        rows = progress.positions_done // progress.block.image_tokens.shape[-1]
        self._job.tell("preview", {"rows": rows, "pictures": pictures})

    def finished(self, pictures: int) -> None:
        """After each picture is decoded at the end."""
        self._job.check()
        self._job.tell("progress", {"phase": "decoding", "done": pictures})


def describe_result(name: str, result: Result) -> dict[str, Any]:
    """What the page needs of a result."""
    names = ("settings", "created", "checkpoints", "reranker", "versions")
    return {"result": name, **result.entry, **{key: result.manifest[key] for key in names}}
