"""What somebody asks the page for: read, and checked as far as that needs no model to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from dalle1.data.fields import require_bool, require_int
from dalle1.data.transforms import MAX_MEGAPIXELS
from dalle1.pipeline import Pipeline
from dalle1.sampling.filters import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one user of the page may ask of the machine."""

    candidates: int = 64  # of a request
    waiting: int = 8  # requests, besides the one that is worked on
    upload_megabytes: float = 20  # 10^6 bytes of a picture's file
    upload_megapixels: float = 40  # of a picture, <= 100; 3 bytes each while it is decoded
    results: int = 50  # requests whose pictures are kept, and as many uploaded pictures

    def __post_init__(self) -> None:
        for name in ("candidates", "waiting", "results"):
            require_int(f"limits.{name}", getattr(self, name), at_least=1)
        for name in ("upload_megabytes", "upload_megapixels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"limits.{name} must be a number above 0, got {value!r}")
        if self.upload_megapixels > MAX_MEGAPIXELS:
            raise ValueError(
                f"limits.upload_megapixels must be <= {MAX_MEGAPIXELS}, more is not decoded, "
                f"got {self.upload_megapixels}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A request for pictures of one prompt."""

    prompt: str
    negative_prompt: str | None
    candidates: int
    keep: int | None
    seed: int
    sampling: SamplingConfig
    picture: str | None  # the id of an uploaded picture
    again: Bool[Tensor, "gh gw"] | None  # its cells that are sampled again
    paste_kept: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What sample.py takes for the same pictures, in plain types; it finds a picture and a mask by their files."""
        picture, mask = (None, None) if self.picture is None else ("image.png", "mask.png")
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "candidates": self.candidates,
            "keep": self.keep,
            "seed": self.seed,
            **asdict(self.sampling),
            "image": picture,
            "mask": mask,
            "paste_kept": self.paste_kept,
        }


_FIELDS = frozenset(
    ("prompt", "negative_prompt", "candidates", "keep", "seed", "temperature", "temperature_end", "top_k", "top_p")
) | {"guidance_scale", "picture", "again", "paste_kept"}


def read_asked(body: bytes, *, pipeline: Pipeline, limits: Limits) -> Asked:
    """The request in a JSON object with the fields of `Asked`, those of `sampling` among them.

    `again` is a list of rows of 0 and 1. All fields but the prompt may be missing; they are the defaults of
    `Pipeline.stream` then, and guidance that of the model.

    Raises: ValueError or TypeError with one sentence for what is wrong.
    """
    given = _parse(body)
    prompt = _text("prompt", given.get("prompt"))
    negative_prompt = given.get("negative_prompt")
    if negative_prompt is not None:
        negative_prompt = _text("negative_prompt", negative_prompt)
    (prompt,) = pipeline.check_prompts([prompt])
    candidates = given.get("candidates", 1)
    require_int("candidates", candidates, at_least=1)
    if candidates > limits.candidates:
        raise ValueError(f"candidates must be at most {limits.candidates} here, got {candidates}")
    keep = given.get("keep")
    if keep is not None:
        require_int("keep", keep, at_least=1)
        if keep > candidates:
            raise ValueError(f"keep must be at most the number of candidates, {candidates}, got {keep}")
    seed = given.get("seed", 0)
    require_int("seed", seed, at_least=0)
    sampling = _sampling(given, pipeline)
    pipeline.check_guidance(sampling.guidance_scale, negative_prompt)
    picture, again = given.get("picture"), given.get("again")
    if (picture is None) != (again is None):
        raise ValueError("picture and again must be given together: a picture, and its cells to sample again")
    paste_kept = given.get("paste_kept", False)
    require_bool("paste_kept", paste_kept)
    if paste_kept and picture is None:
        raise ValueError("paste_kept says what of a picture stays, so it needs a picture, got none")
    config = pipeline.transformer.model.config
    return Asked(
        prompt=prompt,
        negative_prompt=negative_prompt,
        candidates=candidates,
        keep=keep,
        seed=seed,
        sampling=sampling,
        picture=None if picture is None else _text("picture", picture),
        again=None if again is None else _cells(again, (config.grid_height, config.grid_width)),
        paste_kept=paste_kept,
    )


def _parse(body: bytes) -> Mapping[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("a request must be a JSON object, this one cannot be read") from error
    if not isinstance(given, dict):
        raise TypeError(f"a request must be a JSON object, got {type(given).__name__}")
    unknown = sorted(set(given) - _FIELDS)
    if unknown:
        raise ValueError(f"a request has no field {unknown[0][:40]!r}; there are {', '.join(sorted(_FIELDS))}")
    return given


def _sampling(given: Mapping[str, Any], pipeline: Pipeline) -> SamplingConfig:
    names = ("temperature", "temperature_end", "top_k", "top_p", "guidance_scale")
    options = {name: given[name] for name in names if name in given}
    options.setdefault("guidance_scale", pipeline.default_guidance_scale)
    try:
        sampling = SamplingConfig(**options)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).removeprefix("SamplingConfig.")) from error
    config = pipeline.transformer.model.config
    sampling.temperatures(config.grid_height, config.grid_width)
    return sampling


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {type(value).__name__}")
    return value


def _cells(rows: object, grid: tuple[int, int]) -> Bool[Tensor, "gh gw"]:
    height, width = grid
    is_grid = isinstance(rows, list) and len(rows) == height
    if not (is_grid and all(isinstance(row, list) and len(row) == width for row in rows)):  # type: ignore[attr-defined]
        raise ValueError(f"again must have {height} rows of {width} cells")
    if any(type(cell) is not int or cell not in (0, 1) for row in rows for cell in row):  # type: ignore[attr-defined]
        raise ValueError("cells of again must be 0, which stays, or 1, which is sampled again")
    again = torch.tensor(rows, dtype=torch.bool)
    if again.all():
        raise ValueError("some cells of the picture must stay, all are marked; unmark some, or go on without a picture")
    if not again.any():
        raise ValueError("some cells of the picture must be marked to be sampled again, none are")
    return again
