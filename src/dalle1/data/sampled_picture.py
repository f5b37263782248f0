"""What travels in the file of a sampled picture: prompt, seed, hashes of the weights, and its image tokens."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

_TOKENS_KEY = "image_tokens"


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledPicture:
    """Read from the file of a picture that was sampled by this program."""

    prompt: str
    dvae_sha256: str  # whose tokens they are
    image_tokens: Int[Tensor, "gh gw"] | None  # int64; None if the file has none that can be read

    def tokens_of(self, dvae_sha256: str, grid: tuple[int, int]) -> Int[Tensor, "gh gw"] | None:
        """Its tokens, if they are those of this dVAE and of this grid."""
        if self.image_tokens is None or self.dvae_sha256 != dvae_sha256 or self.image_tokens.shape != grid:
            return None
        return self.image_tokens


def picture_text(
    image_tokens: Int[Tensor, "gh gw"],
    *,
    prompt: str,
    seed: int,
    candidate: int,
    score: float | None,
    hashes: Mapping[str, str],
) -> dict[str, str]:
    """Texts for a PNG. `hashes` are those of `transformer` and `dvae`."""
    text = {"prompt": prompt, "seed": str(seed), "candidate": str(candidate)}
    if score is not None:
        text["score"] = f"{score:.6f}"
    text |= {f"{part}_sha256": sha256 for part, sha256 in hashes.items()}
    return text | {_TOKENS_KEY: json.dumps(image_tokens.tolist(), separators=(",", ":"))}


def read_sampled_picture(data: bytes) -> SampledPicture | None:
    """What the bytes of a picture's file say of its origin; None if it was not sampled by this program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                info = dict(image.info)
    except Exception:  # no PNG, or whatever its reader stumbles over
        return None
    # Other programs keep other things under `prompt`.
    prompt, dvae_sha256 = info.get("prompt"), info.get("dvae_sha256")
    if not isinstance(prompt, str) or not isinstance(dvae_sha256, str):
        return None
    return SampledPicture(
        prompt=prompt.strip(), dvae_sha256=dvae_sha256, image_tokens=_parse_tokens(info.get(_TOKENS_KEY))
    )


def _parse_tokens(text: object) -> Int[Tensor, "gh gw"] | None:
    try:
        rows = json.loads(text) if isinstance(text, str) else None
        tokens = torch.tensor(rows, dtype=torch.int64)
    except (ValueError, TypeError, RuntimeError, RecursionError):  # a text that somebody changed
        return None
    return tokens if tokens.ndim == 2 and tokens.numel() and int(tokens.min()) >= 0 else None
