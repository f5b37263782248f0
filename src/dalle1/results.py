"""Writes one run of sampling to a directory: every picture, captioned grids, and a manifest of what made them.

All files appear at once: they are written beside the directory and renamed, so a reader never sees half a run.
"""

from __future__ import annotations

import platform
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo

from dalle1.atomic_files import atomic_directory, write_json
from dalle1.evaluation.pictures import to_pictures
from dalle1.picture_grid import GridBlock, draw_grids
from dalle1.pipeline import PromptResult

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class WrittenRun:
    """Where a run's files are, and what it gave."""

    grids: list[Path]
    manifest: Path
    n_pictures: int
    best_score: float | None  # None without CLIP

    def __str__(self) -> str:
        lines = [f"{self.n_pictures} pictures"]
        if self.best_score is not None:
            lines[0] += f", best score {self.best_score:.3f}"
        return "\n".join([*lines, *(f"grid:     {grid}" for grid in self.grids), f"manifest: {self.manifest}"])


def default_directory(parent: str | Path, prompts: Sequence[str]) -> Path:
    """A directory that does not exist yet, named after the prompt (or how many there are) and the time."""
    return new_directory(parent, slug(prompts[0]) if len(prompts) == 1 else f"{len(prompts)}-prompts")


def new_directory(parent: str | Path, name: str) -> Path:
    """A directory in `parent` that does not exist yet, called after `name` and the time."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = Path(parent) / stem, 2
    while path.exists():
        path, number = Path(parent) / f"{stem}-{number}", number + 1
    return path


def write_run(
    results: Sequence[PromptResult],
    directory: str | Path,
    *,
    settings: Mapping[str, Any],
    checkpoints: Mapping[str, Mapping[str, Any]],
) -> WrittenRun:
    """Write pictures, grids and manifest into a new directory.

    Args:
        results: What the pipeline gave.
        directory: Where to; parents are made.
        settings: Of the run, in plain types, for the manifest.
        checkpoints: Hashes of the weights, for the manifest and every picture (`Pipeline.checkpoints`).

    Raises:
        FileExistsError: As `atomic_files.check_directory`.
    """
    with atomic_directory(directory) as partial:
        prompts = [_write_pictures(number, result, partial, checkpoints) for number, result in enumerate(results, 1)]
        grids = _write_grids(results, partial)
        content = {
            "format_version": MANIFEST_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
            "settings": settings,
            "checkpoints": checkpoints,
            "grids": grids,
            "prompts": prompts,
        }
        write_json(partial / MANIFEST_NAME, content)
    directory = Path(directory)
    return WrittenRun(
        grids=[directory / grid for grid in grids],
        manifest=directory / MANIFEST_NAME,
        n_pictures=sum(len(result.seeds) for result in results),
        best_score=max((score for result in results for score in result.scores or ()), default=None),
    )


def _write_pictures(
    number: int, result: PromptResult, directory: Path, checkpoints: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One prompt's entry in the manifest."""
    entries = []
    for rank, (picture, seed) in enumerate(zip(to_pictures(result.images), result.seeds, strict=True), start=1):
        name = f"{number:04d}-{slug(result.prompt)}-{rank:03d}.png"
        score = result.scores[rank - 1] if result.scores else None
        picture.save(directory / name, pnginfo=_png_text(result.prompt, seed, score, checkpoints))
        entries.append({"file": name, "seed": seed, "score": score})
    return {"prompt": result.prompt, "pictures": entries}


def _write_grids(results: Sequence[PromptResult], directory: Path) -> list[str]:
    """Names of the pages with all pictures: `grid.png`, or numbered if one page is not enough."""
    pages = draw_grids(
        [
            GridBlock(
                title=result.prompt,
                pictures=to_pictures(result.images),
                captions=[f"{score:.3f}" for score in result.scores or ()],
            )
            for result in results
        ]
    )
    names = ["grid.png"] if len(pages) == 1 else [f"grid-{number:03d}.png" for number in range(1, len(pages) + 1)]
    for name, page in zip(names, pages, strict=True):
        page.save(directory / name)
    return names


def slug(text: str, *, length: int = 40) -> str:
    """A short name for files, of a-z, 0-9 and dashes; `prompt` if nothing of the text can be spelled so."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:length].rstrip("-") or "prompt"


def _png_text(prompt: str, seed: int, score: float | None, checkpoints: Mapping[str, Mapping[str, Any]]) -> PngInfo:
    """Text that travels inside a picture's file."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_text("seed", str(seed))
    if score is not None:
        info.add_text("score", f"{score:.6f}")
    for part, facts in checkpoints.items():
        info.add_text(f"{part}_sha256", facts["sha256"])
    return info


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("dalle1")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"dalle1": own, "torch": torch.__version__, "python": platform.python_version()}
