"""The directory of one run of sampling.

| file | |
|---|---|
| `manifest.json` | what the run was made from, and every picture with its seed and score |
| `tokens/0001.npy` | image tokens of all candidates of prompt 1, so far |
| `0001-a-red-circle-0007.png` | candidate 7 (from 0) of prompt 1; only those that are kept have a picture |
| `grid.png`, `index.html` | all pictures, best first |
| `image.png`, `mask.png` | the picture that all were sampled from, and in white what of it was sampled again |

Tokens are written as they get done, and every file is whole or absent, so a run may be killed at any time and gone on
with; a run with more candidates, or ranked in another way, uses the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from dalle1.atomic_files import atomic, write_json
from dalle1.data.sampled_picture import picture_text
from dalle1.data.transforms import decode_image, to_pixels, to_unit_interval
from dalle1.evaluation.pictures import save_picture, to_pictures
from dalle1.gallery import render_gallery
from dalle1.picture_grid import GridBlock, draw_grids
from dalle1.pipeline import Pipeline, PromptResult
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.image_prompt import ImagePrompt

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
_IMAGE_NAME, _MASK_NAME, _GALLERY_NAME = "image.png", "mask.png", "index.html"


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """All that decides the tokens of a run but the number of candidates, in plain types."""

    prompts: list[str]
    seed: int
    sampling: dict[str, Any]
    negative_prompt: str | None
    image_sha256: str | None  # of the tokens of an image prompt that stay
    dtype: str  # of decoding
    transformer_sha256: str
    dvae_sha256: str

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        prompts: Sequence[str],
        *,
        seed: int,
        sampling: SamplingConfig,
        negative_prompt: str | None,
        image_prompt: ImagePrompt | None,
        dtype: torch.dtype = torch.float32,
    ) -> RunOrigin:
        """The origin of what `pipeline.stream` gives for these arguments."""
        given = None if image_prompt is None else image_prompt.given.numpy().astype("<i8").tobytes()
        return cls(
            prompts=list(prompts),
            seed=seed,
            sampling=json.loads(json.dumps(asdict(sampling))),  # tuples become the lists that JSON has
            negative_prompt=negative_prompt,
            image_sha256=None if given is None else hashlib.sha256(given).hexdigest(),
            dtype=str(dtype).removeprefix("torch."),
            transformer_sha256=pipeline.transformer.sha256,
            dvae_sha256=pipeline.image_tokenizer.sha256,
        )

    @property
    def name(self) -> str:
        """A name for its directory: the prompt or how many there are, and eight digits that stand for all of it."""
        digits = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
        return f"{slug(self.prompts[0]) if len(self.prompts) == 1 else f'{len(self.prompts)}-prompts'}-{digits}"


@dataclass(frozen=True, kw_only=True)
class WrittenRun:
    """Where a run's files are, and what it gave."""

    grids: list[Path]
    gallery: Path
    manifest: Path
    n_pictures: int
    n_sampled: int
    best_score: float | None  # None without a reranker

    def __str__(self) -> str:
        pictures = f"{self.n_pictures} pictures"
        if self.n_sampled > self.n_pictures:
            pictures += f" of {self.n_sampled} sampled"
        if self.best_score is not None:
            pictures += f", best score {self.best_score:.3f}"
        grids = [f"grid:     {grid}" for grid in self.grids]
        return "\n".join([pictures, *grids, f"gallery:  {self.gallery}", f"manifest: {self.manifest}"])


class SampleRun:
    """A run's directory, as the store of its tokens (`sampling.candidate_store`) and the writer of its pictures."""

    def __init__(self, directory: Path, manifest: dict[str, Any], image_prompt: ImagePrompt | None = None) -> None:
        """Use `open` or `reopen`."""
        self.directory = directory
        self._manifest = manifest
        self._image_prompt = image_prompt
        self._entries: dict[int, dict[str, Any]] = {}  # of prompts that were written since

    @classmethod
    def open(
        cls,
        directory: str | Path,
        origin: RunOrigin,
        *,
        checkpoints: Mapping[str, Any],
        image_prompt: ImagePrompt | None = None,
    ) -> SampleRun:
        """A new directory, or one that holds a run of the same origin, to go on with that.

        Raises: FileExistsError if it holds anything else; ValueError as `reopen` does; OSError if nothing can be
            written there.
        """
        directory = Path(directory)
        if (directory / MANIFEST_NAME).is_file():
            run = cls.reopen(directory)
            _check_origin(directory, run.origin, origin)
            return cls(directory, run._manifest, image_prompt)
        # What a process left that died before its manifest was there is no reason to refuse.
        if directory.exists() and not (directory.is_dir() and all(map(_is_left_over, directory.iterdir()))):
            raise FileExistsError(
                f"out must not exist yet, be an empty directory or hold a run of the same settings, got '{directory}'; "
                "choose another one"
            )
        manifest = {
            "format_version": MANIFEST_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "complete": False,
            "origin": asdict(origin),
            "checkpoints": checkpoints,
            "image_prompt": None,
            "prompts": [],
        }
        return cls(directory, manifest, image_prompt)

    def _begin(self) -> None:
        """Make the directory and what says whose it is; until now nothing was written."""
        if (self.directory / MANIFEST_NAME).is_file():
            return
        if self._image_prompt is not None:
            self._manifest["image_prompt"] = {"image": _IMAGE_NAME, "mask": _MASK_NAME}
            save_picture(to_pictures(self._image_prompt.image[None])[0], self.directory / _IMAGE_NAME)
            again = Image.fromarray((~self._image_prompt.kept).numpy().astype(np.uint8) * 255)
            save_picture(again, self.directory / _MASK_NAME)
        write_json(self.directory / MANIFEST_NAME, self._manifest)

    @classmethod
    def reopen(cls, directory: str | Path) -> SampleRun:
        """The run in a directory.

        Raises: FileNotFoundError if there is none; ValueError if it is damaged or of another format.
        """
        path = Path(directory) / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(f"'{directory}' must hold a run of sample.py, it has no {MANIFEST_NAME}")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = manifest["format_version"]
            if version == MANIFEST_VERSION:
                RunOrigin(**manifest["origin"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is damaged ({error}); delete its directory and sample again") from error
        if version != MANIFEST_VERSION:
            raise ValueError(
                f"'{path}' must have format version {MANIFEST_VERSION}, got {version!r}; sample again into another out"
            )
        return cls(Path(directory), manifest)

    @property
    def origin(self) -> RunOrigin:
        """What its tokens were made from."""
        return RunOrigin(**self._manifest["origin"])

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its last call."""
        return dict(self._manifest.get("settings", {}))

    @property
    def is_complete(self) -> bool:
        """Whether the last call was not interrupted."""
        return bool(self._manifest["complete"])

    @property
    def image_prompt(self) -> ImagePrompt | None:
        """The picture that all were sampled from, None if there is none or nothing was sampled yet.

        Raises: ValueError or OSError if its files are damaged or missing.
        """
        facts, tokens = self._manifest["image_prompt"], self.load(0)
        if self._image_prompt is not None or facts is None or tokens is None:
            return self._image_prompt
        image, mask = (decode_image((self.directory / name).read_bytes()) for name in (_IMAGE_NAME, _MASK_NAME))
        return ImagePrompt(
            image=to_unit_interval(to_pixels(image)),
            image_tokens=tokens[0],  # those that stay are the same in all
            kept=to_pixels(mask)[0] == 0,
            paste_kept=self.settings.get("paste_kept", False),
        )

    def load(self, prompt: int) -> Int[Tensor, "n gh gw"] | None:
        """Tokens of a prompt's first candidates.

        Raises: ValueError if their file is damaged.
        """
        path = self._tokens_path(prompt)
        if not path.is_file():
            return None
        try:
            tokens = np.load(path, allow_pickle=False)
            if tokens.ndim != 3 or not len(tokens):
                raise ValueError(f"its shape is {tokens.shape}")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"'{path}' is damaged ({error}); delete it, and its pictures are sampled again") from error
        return torch.from_numpy(tokens.astype(np.int64))

    def save(self, prompt: int, image_tokens: Int[Tensor, "n gh gw"]) -> None:
        """Keep the tokens of a prompt's first candidates."""
        self._begin()
        # No tokenizer has 2^16 codes or more in practice; where one had, they take more room.
        dtype = np.uint16 if int(image_tokens.max()) < 2**16 else np.int32
        with atomic(self._tokens_path(prompt)) as temporary, open(temporary, "wb") as file:
            np.save(file, image_tokens.numpy().astype(dtype))

    def _tokens_path(self, prompt: int) -> Path:
        return self.directory / "tokens" / f"{prompt + 1:04d}.npy"

    def has_written(self, prompt: int) -> bool:
        """Whether `write` was called for it."""
        return prompt in self._entries

    @property
    def has_pictures(self) -> bool:
        """Whether `write` was called."""
        return bool(self._entries)

    def write(self, prompt: int, result: PromptResult) -> None:
        """Write the pictures of a prompt."""
        self._begin()
        pictures = []
        scores: Sequence[float | None] = result.scores or [None] * len(result.seeds)
        hashes = {part: facts["sha256"] for part, facts in self._manifest["checkpoints"].items()}
        rows = zip(
            to_pictures(result.images), result.image_tokens, result.candidates, result.seeds, scores, strict=True
        )
        for picture, tokens, candidate, seed, score in rows:
            name = f"{prompt + 1:04d}-{slug(result.prompt)}-{candidate:04d}.png"
            text = picture_text(
                tokens, prompt=result.prompt, seed=seed, candidate=candidate, score=score, hashes=hashes
            )
            save_picture(picture, self.directory / name, text=text)
            pictures.append({"file": name, "candidate": candidate, "seed": seed, "score": score})
        self._entries[prompt] = {"prompt": result.prompt, "sampled": result.sampled, "pictures": pictures}

    def finish(self, *, settings: Mapping[str, Any], reranker: Mapping[str, Any] | None, complete: bool) -> WrittenRun:
        """Write grids, gallery and manifest of all that was written; pictures that are no longer kept go.

        Args:
            settings: Of the run, in plain types.
            reranker: What identifies it (`Reranker.facts`).
            complete: Whether all that was asked for is there.
        """
        before = {picture["file"] for entry in self._manifest["prompts"] for picture in entry["pictures"]}
        prompts = [self._entries[number] for number in sorted(self._entries)]
        self._manifest |= {
            "complete": complete,
            "versions": _versions(),
            "settings": settings,
            "reranker": reranker,
            "prompts": prompts,
        }
        self._manifest["grids"] = self._write_grids(prompts)
        write_json(self.directory / MANIFEST_NAME, self._manifest)
        with atomic(self.directory / _GALLERY_NAME) as temporary:
            temporary.write_text(render_gallery(self._manifest, self._open), encoding="utf-8")
        for name in before - {picture["file"] for entry in prompts for picture in entry["pictures"]}:
            (self.directory / name).unlink(missing_ok=True)
        pictures = [picture for entry in prompts for picture in entry["pictures"]]
        return WrittenRun(
            grids=[self.directory / grid for grid in self._manifest["grids"]],
            gallery=self.directory / _GALLERY_NAME,
            manifest=self.directory / MANIFEST_NAME,
            n_pictures=len(pictures),
            n_sampled=sum(entry["sampled"] for entry in prompts),
            best_score=max((each["score"] for each in pictures if each["score"] is not None), default=None),
        )

    def _open(self, name: str) -> Image.Image:
        with Image.open(self.directory / name) as picture:
            picture.load()
            return picture

    def _write_grids(self, prompts: Sequence[dict[str, Any]]) -> list[str]:
        """Names of the pages with all pictures: `grid.png`, or numbered if one page is not enough."""
        pages = draw_grids(self._grid_blocks(prompts))
        names = ["grid.png"] if len(pages) == 1 else [f"grid-{number:03d}.png" for number in range(1, len(pages) + 1)]
        for name, page in zip(names, pages, strict=True):
            save_picture(page, self.directory / name)
        for old in self.directory.glob("grid*.png"):
            if old.name not in names:
                old.unlink()
        return names

    def _grid_blocks(self, prompts: Sequence[dict[str, Any]]) -> Iterator[GridBlock]:
        """One for each prompt: its pictures, after the image prompt and what of that was kept."""
        image_prompt = self.image_prompt
        first, first_captions = [], []
        if image_prompt is not None:
            first = to_pictures(torch.stack([image_prompt.image, image_prompt.shown]))
            first_captions = ["image", "kept"]
        for entry in prompts:
            captions = ["" if each["score"] is None else f"{each['score']:.3f}" for each in entry["pictures"]]
            yield GridBlock(
                title=entry["prompt"],
                pictures=[*first, *(self._open(each["file"]) for each in entry["pictures"])],
                captions=[*first_captions, *captions] if first or any(captions) else [],
            )


def _check_origin(directory: Path, there: RunOrigin, asked: RunOrigin) -> None:
    for name, value in asdict(there).items():
        wanted = asdict(asked)[name]
        if value != wanted:
            raise FileExistsError(
                f"out='{directory}' holds a run with {name} {_short(value)}, this one has {_short(wanted)}; "
                "choose another out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_left_over(path: Path) -> bool:
    return path.name.endswith(".partial") or path.name in (_IMAGE_NAME, _MASK_NAME)


def new_directory(parent: str | Path, name: str) -> Path:
    """A directory in `parent` that does not exist yet, called after `name` and the time."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = Path(parent) / stem, 2
    while path.exists():
        path, number = Path(parent) / f"{stem}-{number}", number + 1
    return path


def slug(text: str, *, length: int = 40) -> str:
    """A short name for files, of a-z, 0-9 and dashes; `prompt` if nothing of the text can be spelled so."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:length].rstrip("-") or "prompt"


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("dalle1")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"dalle1": own, "torch": torch.__version__, "python": platform.python_version()}
