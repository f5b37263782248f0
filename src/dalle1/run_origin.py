"""What decides the tokens of a run of sampling, and a name for it."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dalle1.pipeline import Pipeline
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.image_prompt import ImagePrompt


@dataclass(frozen=True, kw_only=True)
class RunOrigin:
    """All that decides the tokens of a run but the number of candidates, in plain types."""

    prompts: list[str]
    seed: int
    sampling: dict[str, Any]
    negative_prompt: str | None
    image_sha256: str | None  # of the tokens of an image prompt that stay
    dtype: str  # of decoding
    grid: list[int]  # height and width in tokens
    image_vocab_size: int
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
        dtype: torch.dtype,
    ) -> RunOrigin:
        """The origin of what `pipeline.stream` gives for these arguments."""
        config = pipeline.transformer.model.config
        given = None if image_prompt is None else image_prompt.given.numpy().astype("<i8").tobytes()
        return cls(
            prompts=list(prompts),
            seed=seed,
            sampling=json.loads(json.dumps(asdict(sampling))),  # tuples become the lists that JSON has
            negative_prompt=negative_prompt,
            image_sha256=None if given is None else hashlib.sha256(given).hexdigest(),
            dtype=str(dtype).removeprefix("torch."),
            grid=[config.grid_height, config.grid_width],
            image_vocab_size=config.image_vocab_size,
            transformer_sha256=pipeline.transformer.sha256,
            dvae_sha256=pipeline.image_tokenizer.sha256,
        )

    @property
    def name(self) -> str:
        """A name for its directory: the prompt or how many there are, and eight digits that stand for all of it."""
        digits = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
        return f"{slug(self.prompts[0]) if len(self.prompts) == 1 else f'{len(self.prompts)}-prompts'}-{digits}"

    def check_equal(self, asked: RunOrigin, directory: Path) -> None:
        """Raise FileExistsError, which names the first difference, unless `directory` holds what is `asked` for."""
        mine, theirs = _flat(self), _flat(asked)
        for name, value in mine.items():
            if value != (wanted := theirs.get(name)):
                there, here = _difference(name, value, wanted)
                raise FileExistsError(
                    f"out='{directory}' holds a run with {there}, this one has {here}; choose another out"
                )


def _flat(origin: RunOrigin) -> dict[str, Any]:
    content = asdict(origin)
    return content.pop("sampling") | content


def _difference(name: str, there: Any, here: Any) -> tuple[str, str]:
    """A value that differs in words, there and here."""
    if name == "image_sha256":
        return "another image, or other cells of it that stay", "its own"
    if name == "prompts":
        pair = next((pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]), None)
        if pair is None:
            return f"{len(there)} prompts", str(len(here))
        return f"the prompt {_short(pair[0])}", _short(pair[1])
    return f"{name} {_short(there)}", _short(here)


def slug(text: str, *, length: int = 40) -> str:
    """A short name for files, of a-z, 0-9 and dashes; `prompt` if nothing of the text can be spelled so."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:length].rstrip("-") or "prompt"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
