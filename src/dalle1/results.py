"""The directory of one run of sampling.

| file | |
|---|---|
| `manifest.json` | what the run was made from, and every picture with its score |
| `tokens/0001.npy` | image tokens of all candidates of prompt 1, so far |
| `tokens/0001.json` | which of them are kept, and how they were chosen, once they are |
| `0001-a-red-circle-0007.png` | candidate 7 (from 0) of prompt 1; only those that are kept have a picture |
| `grid.png`, `index.html` | all pictures, best first |
| `image.png`, `mask.png` | the picture that all were sampled from, and in white what of it was sampled again |

Tokens are written as they get done, and every file is whole or absent, so a run may be killed at any time and gone on
with; a run with more candidates, or ranked in another way, uses the same tokens.
"""

from __future__ import annotations

import json
import platform
import re
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
from dalle1.data.sampled_picture import MANIFEST_NAME, PICTURE_NAME, picture_text
from dalle1.data.transforms import decode_image, to_pixels, to_unit_interval
from dalle1.decode_and_rank import PromptResult
from dalle1.evaluation.pictures import save_picture, to_pictures
from dalle1.gallery import render_gallery
from dalle1.picture_grid import GridBlock, draw_grids
from dalle1.run_origin import RunOrigin, slug
from dalle1.sampling.image_prompt import ImagePrompt

MANIFEST_VERSION = 2
_GRID_NAME = re.compile(r"grid(-\d{3,})?\.png")
_IMAGE_NAME, _MASK_NAME, _GALLERY_NAME = "image.png", "mask.png", "index.html"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the kept pictures of a prompt were chosen, in plain types."""

    sampled: int  # candidates that they were chosen from
    # How many, the best; of a list the best of the first so many candidates each.
    keep: int | list[int] | None
    reranker: dict[str, Any] | None  # `Reranker.facts`
    paste_kept: bool  # see `ImagePrompt`


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
        pictures = f"{self.n_pictures} picture{'s' * (self.n_pictures != 1)}"
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
        self.has_begun = False
        self._entries: dict[int, dict[str, Any]] = {}  # of prompts whose pictures are there

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
            run.origin.check_equal(origin, directory)
            return cls(directory, run._manifest, image_prompt)
        # What a process left that died before its manifest was there is no reason to refuse.
        if directory.exists() and not (directory.is_dir() and all(map(_is_partial, directory.iterdir()))):
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
            "has_image_prompt": image_prompt is not None,
        }
        return cls(directory, manifest, image_prompt)

    def begin(self) -> None:
        """Make the directory and what says whose it is, before anything else is written there; may be called again."""
        if self.has_begun:
            return
        self._manifest["complete"] = False
        write_json(self.directory / MANIFEST_NAME, self._manifest)
        if self._image_prompt is not None:
            save_picture(to_pictures(self._image_prompt.image[None])[0], self.directory / _IMAGE_NAME)
            again = Image.fromarray((~self._image_prompt.kept).numpy().astype(np.uint8) * 255)
            save_picture(again, self.directory / _MASK_NAME)
        self.has_begun = True

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
                missing = {"created", "complete", "checkpoints", "has_image_prompt"} - set(manifest)
                if missing:
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is damaged ({error}); restore it, or sample into another out") from error
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
    def entries(self) -> list[dict[str, Any]]:
        """Of each prompt that its last call finished: `prompt`, `sampled`, and `pictures`, best first."""
        return list(self._manifest.get("prompts", []))

    @property
    def facts(self) -> dict[str, Any]:
        """What its pictures were made by and chosen by, in plain types."""
        return {name: self._manifest.get(name) for name in ("origin", "checkpoints", "reranker", "settings")}

    @property
    def is_complete(self) -> bool:
        """Whether the last call was not interrupted."""
        return bool(self._manifest["complete"])

    @property
    def image_prompt(self) -> ImagePrompt | None:
        """The picture that all were sampled from, None if there is none or nothing was sampled yet.

        Raises: ValueError or OSError if its files are damaged or missing.
        """
        if self._image_prompt is not None or not self._manifest["has_image_prompt"]:
            return self._image_prompt
        numbers = range(len(self.origin.prompts))
        tokens = next((tokens for number in numbers if (tokens := self.load(number)) is not None), None)
        if tokens is None:
            return None
        image, mask = (decode_image((self.directory / name).read_bytes()) for name in (_IMAGE_NAME, _MASK_NAME))
        return ImagePrompt(
            image=to_unit_interval(to_pixels(image)),
            image_tokens=tokens[0],  # those that stay are the same in all
            kept=to_pixels(mask)[0] == 0,
            paste_kept=self.settings.get("paste_kept", False),
        )

    def count(self, prompt: int) -> int:
        """How many candidates of a prompt have tokens; only the head of their file is read.

        Raises: ValueError if that is damaged.
        """
        path = self._tokens_path(prompt)
        if not path.is_file():
            return 0
        try:
            return len(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise _damaged(path, error) from error

    def load(self, prompt: int) -> Int[Tensor, "n gh gw"] | None:
        """Tokens of a prompt's first candidates.

        Raises: ValueError if their file is damaged.
        """
        path = self._tokens_path(prompt)
        if not path.is_file():
            return None
        try:
            tokens = np.load(path, allow_pickle=False)
            origin = self.origin
            if tokens.ndim != 3 or not len(tokens) or list(tokens.shape[1:]) != origin.grid:
                raise ValueError(f"its shape is {tokens.shape}")
            if tokens.dtype.kind not in "iu" or not 0 <= tokens.min() <= tokens.max() < origin.image_vocab_size:
                raise ValueError(f"it holds other numbers than tokens in [0, {origin.image_vocab_size})")
        except (ValueError, EOFError, OSError) as error:
            raise _damaged(path, error) from error
        return torch.from_numpy(tokens.astype(np.int64))

    def save(self, prompt: int, image_tokens: Int[Tensor, "n gh gw"]) -> None:
        """Keep the tokens of a prompt's first candidates."""
        self.begin()
        # No tokenizer has 2^16 codes or more in practice; where one had, they take more room.
        dtype = np.uint16 if int(image_tokens.max()) < 2**16 else np.int32
        with atomic(self._tokens_path(prompt)) as temporary, open(temporary, "wb") as file:
            np.save(file, image_tokens.numpy().astype(dtype))

    def _tokens_path(self, prompt: int) -> Path:
        return self.directory / "tokens" / f"{prompt + 1:04d}.npy"

    def has_written(self, prompt: int) -> bool:
        """Whether its pictures are among those that `finish` shows."""
        return prompt in self._entries

    @property
    def has_pictures(self) -> bool:
        """Whether those of any prompt are."""
        return bool(self._entries)

    def find_written(self, prompt: int, choice: Choice) -> bool:
        """Take over the pictures that an earlier call wrote, if it chose them in the same way and all are there."""
        path = self._choice_path(prompt)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entry = content["entry"]
            names = [picture["file"] for picture in entry["pictures"]]
            is_same = content["choice"] == asdict(choice) and all(map(self._is_picture, names))
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one: they are written again
            return False
        if is_same:
            self._entries[prompt] = entry
        return is_same

    def write(self, prompt: int, result: PromptResult, choice: Choice) -> None:
        """Write the pictures of a prompt."""
        self.begin()
        pictures = []
        scores: Sequence[float | None] = result.scores or [None] * len(result.candidates)
        hashes = {part: facts["sha256"] for part, facts in self._manifest["checkpoints"].items()}
        origin = self.origin
        for image, tokens, candidate, score in zip(
            result.images, result.image_tokens, result.candidates, scores, strict=True
        ):
            name = f"{prompt + 1:04d}-{slug(result.prompt)}-{candidate:04d}.png"
            picture = to_pictures(image[None])[0]
            text = picture_text(
                picture,
                tokens,
                prompt=result.prompt,
                seed=origin.seed,
                candidate=candidate,
                score=score,
                sampling=origin.sampling | {"negative_prompt": origin.negative_prompt, "dtype": origin.dtype},
                hashes=hashes,
            )
            save_picture(picture, self.directory / name, text=text)
            pictures.append({"file": name, "candidate": candidate, "score": score})
        entry = {"prompt": result.prompt, "sampled": result.sampled, "pictures": pictures}
        write_json(self._choice_path(prompt), {"choice": asdict(choice), "entry": entry})
        self._entries[prompt] = entry

    def finish(
        self,
        *,
        settings: Mapping[str, Any],
        reranker: Mapping[str, Any] | None,
        complete: bool,
        with_grids: bool = True,
    ) -> WrittenRun:
        """Write grids, gallery and manifest of all that was written; pictures that are no longer kept go.

        Args:
            settings: Of the run, in plain types.
            reranker: What identifies it (`Reranker.facts`).
            complete: Whether all that was asked for is there.
            with_grids: Whether to; they have every picture once more, so that thousands are too many to look at.
        """
        self.begin()
        prompts = [self._entries[number] for number in sorted(self._entries)]
        grids = self._write_grids(prompts) if with_grids else []
        self._manifest |= {
            "complete": complete,
            "versions": versions(),
            "settings": settings,
            "reranker": reranker,
            "grids": grids,
            "prompts": prompts,
        }
        write_json(self.directory / MANIFEST_NAME, self._manifest)
        with atomic(self.directory / _GALLERY_NAME) as temporary:
            temporary.write_text(render_gallery(self._manifest, self._open), encoding="utf-8")
        pictures = [picture for entry in prompts for picture in entry["pictures"]]
        self._sweep({*grids, *(picture["file"] for picture in pictures)})
        return WrittenRun(
            grids=[self.directory / grid for grid in grids],
            gallery=self.directory / _GALLERY_NAME,
            manifest=self.directory / MANIFEST_NAME,
            n_pictures=len(pictures),
            n_sampled=sum(entry["sampled"] for entry in prompts),
            best_score=max((each["score"] for each in pictures if each["score"] is not None), default=None),
        )

    def _sweep(self, kept: set[str]) -> None:
        """Remove pictures and grids of earlier calls, and nothing else: by their names here, whatever a file says."""
        for path in self.directory.iterdir():
            is_ours = PICTURE_NAME.fullmatch(path.name) or _GRID_NAME.fullmatch(path.name)
            if is_ours and path.name not in kept:
                path.unlink(missing_ok=True)

    def _choice_path(self, prompt: int) -> Path:
        return self._tokens_path(prompt).with_suffix(".json")

    def _is_picture(self, name: str) -> bool:
        return PICTURE_NAME.fullmatch(name) is not None and (self.directory / name).is_file()

    def _open(self, name: str) -> Image.Image:
        with Image.open(self.directory / name) as picture:
            picture.load()
            return picture

    def _write_grids(self, prompts: Sequence[dict[str, Any]]) -> list[str]:
        """Names of the pages with all pictures: `grid.png`, or numbered if one page is not enough."""
        names: list[str] = []
        for number, page in enumerate(draw_grids(self._grid_blocks(prompts)), 1):
            names.append(f"grid-{number:03d}.png")
            save_picture(page, self.directory / names[-1])
        if len(names) > 1:
            return names
        (self.directory / names[0]).replace(self.directory / "grid.png")
        return ["grid.png"]

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
                columns=min(8, len(first) + len(captions)) if len(prompts) > 1 else None,
            )


class RunPart:
    """The store of some of a run's prompts."""

    def __init__(self, run: SampleRun, numbers: Sequence[int]) -> None:
        """Of the prompts with these `numbers`, under the numbers from 0."""
        self._run, self._numbers = run, numbers

    def count(self, prompt: int) -> int:
        """See `SampleRun`."""
        return self._run.count(self._numbers[prompt])

    def load(self, prompt: int) -> Int[Tensor, "n gh gw"] | None:
        """See `SampleRun`."""
        return self._run.load(self._numbers[prompt])

    def save(self, prompt: int, image_tokens: Int[Tensor, "n gh gw"]) -> None:
        """See `SampleRun`."""
        self._run.save(self._numbers[prompt], image_tokens)


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"'{path}' is damaged ({error}); delete it, and its pictures are sampled again")


def _is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def new_directory(parent: str | Path, name: str) -> Path:
    """A directory in `parent` that does not exist yet, called after `name` and the time."""
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = Path(parent) / stem, 2
    while path.exists():
        path, number = Path(parent) / f"{stem}-{number}", number + 1
    return path


def versions() -> dict[str, str]:
    """What made something: versions of this program, of PyTorch and of Python."""
    try:
        own = metadata.version("dalle1")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"dalle1": own, "torch": torch.__version__, "python": platform.python_version()}
