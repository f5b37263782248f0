"""What travels in the file of a sampled picture: what it was made from, and its image tokens."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

# In the directory of a run (`results`): what says that it is one, and its pictures, which are not all that is there.
MANIFEST_NAME = "manifest.json"
PICTURE_NAME = re.compile(r"\d{4,}-[a-z0-9-]+-\d{4,}\.png")
_TOKENS_KEY, _PIXELS_KEY = "image_tokens", "pixels_sha256"


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledPicture:
    """Read from the file of a picture that was sampled by this program."""

    prompt: str
    dvae_sha256: str  # whose tokens they are
    image_tokens: Int[Tensor, "gh gw"] | None  # int64; None if the file has none, or its pixels are no longer theirs

    def tokens_of(self, dvae_sha256: str, *, grid: tuple[int, int], vocab_size: int) -> Int[Tensor, "gh gw"] | None:
        """Its tokens, if they are those of this dVAE and of this grid."""
        tokens = self.image_tokens
        if tokens is None or self.dvae_sha256 != dvae_sha256 or tokens.shape != grid or int(tokens.max()) >= vocab_size:
            return None
        return tokens


def picture_text(
    picture: Image.Image,
    image_tokens: Int[Tensor, "gh gw"],
    *,
    prompt: str,
    seed: int,
    candidate: int,
    score: float | None,
    sampling: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> dict[str, str]:
    """Texts for a picture's PNG: prompt, seed of the run, number of the candidate and settings give it again.

    `hashes` are those of the weights of `transformer` and `dvae`.
    """
    text = {"prompt": prompt, "seed": str(seed), "candidate": str(candidate), "sampling": _compact(sampling)}
    if score is not None:
        text["score"] = f"{score:.6f}"
    text |= {f"{part}_sha256": sha256 for part, sha256 in hashes.items()}
    return text | {_TOKENS_KEY: _compact(image_tokens.tolist()), _PIXELS_KEY: _hash_pixels(picture)}


def read_sampled_picture(data: bytes) -> SampledPicture | None:
    """What the bytes of a picture's file say of its origin; None if it was not sampled by this program.

    Other programs that crop or paint a picture keep its texts: its tokens count only if every pixel is as it was.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                info = dict(image.info)
                is_unchanged = info.get(_PIXELS_KEY) == _hash_pixels(image)
    except Exception:  # no PNG, or whatever its reader stumbles over
        return None
    # Other programs keep other things under `prompt`.
    prompt, dvae_sha256 = info.get("prompt"), info.get("dvae_sha256")
    if not isinstance(prompt, str) or not isinstance(dvae_sha256, str):
        return None
    tokens = _parse_tokens(info.get(_TOKENS_KEY)) if is_unchanged else None
    return SampledPicture(prompt=prompt.strip(), dvae_sha256=dvae_sha256, image_tokens=tokens)


def _parse_tokens(text: object) -> Int[Tensor, "gh gw"] | None:
    try:
        rows = json.loads(text) if isinstance(text, str) else None
        tokens = torch.tensor(rows)
    except (ValueError, TypeError, RuntimeError, RecursionError, OverflowError):  # a text that somebody changed
        return None
    is_grid = tokens.dtype == torch.int64 and tokens.ndim == 2 and tokens.numel() > 0
    return tokens if is_grid and int(tokens.min()) >= 0 else None


def _hash_pixels(picture: Image.Image) -> str:
    return hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()


def _compact(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))
