"""Ranks pictures with a CLIP of our own, stage `clip` (Ramesh et al. 2021, sec. 2.6)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.checkpoint import Loaded, load_clip, text_tokenizer_of
from dalle1.models.clip import CLIP

_BATCH_SIZE = 64  # pictures at once


class CLIPReranker:
    """Scores are cosine similarities of picture and prompt, in [-1, 1]."""

    def __init__(self, clip: Loaded[CLIP]) -> None:
        """Rank with a loaded CLIP.

        Raises: ValueError if its checkpoint has no text tokenizer.
        """
        self._clip = clip
        self._tokenizer = text_tokenizer_of(clip, "CLIP")

    @classmethod
    def load(cls, path: str | Path) -> CLIPReranker:
        """Rank with the CLIP in a checkpoint.

        Raises: FileNotFoundError if there is none; ValueError as `checkpoint.load_clip` and `__init__` do.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"no CLIP at '{path}'; train it (stage=clip), or do without ranking: rerank=none")
        return cls(load_clip(path))

    @property
    def facts(self) -> Mapping[str, Any]:
        """Hash and training steps of the weights."""
        return {"kind": "clip", "sha256": self._clip.sha256, "step": self._clip.step}

    def to(self, device: torch.device) -> None:
        """Move the CLIP."""
        self._clip.model.to(device)

    def check(self, prompt: str) -> None:
        """Raise ValueError if the prompt is longer than the captions that the CLIP was trained with."""
        if len(ids := self._tokenizer.ids(prompt)) > self._tokenizer.seq_len:
            limit = f"at most {self._tokenizer.seq_len} tokens, as the CLIP was trained with"
            raise ValueError(f"prompt must have {limit}, got {len(ids)}: {prompt[:60]!r}")

    @torch.inference_mode()
    def score(
        self, prompt: str, images: Float[Tensor, "n 3 h w"], image_tokens: Int[Tensor, "n gh gw"]
    ) -> Float[Tensor, " n"]:
        """Similarity of each picture; the tokens are not used."""
        clip = self._clip.model
        device = clip.log_scale.device
        text_feature = clip.encode_text(self._tokenizer.encode([prompt]).to(device))[0]
        scores = [clip.encode_image(part.to(device)) @ text_feature for part in torch.split(images, _BATCH_SIZE)]
        # Rounding can carry a cosine just beyond its bounds.
        return torch.cat(scores).clamp(-1, 1).cpu()
