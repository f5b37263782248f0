"""Ranks pictures by what the transformer itself thinks of their tokens; no other model is needed.

`image`: log p(picture | caption), how likely the picture is. It likes plain pictures, and says little of the caption.

`caption`: log p(caption | picture) - log p(caption) = log p(picture | caption) - log p(picture), by Bayes' rule: how
much likelier the picture makes the caption. The second term needs a transformer that was trained on pictures without
captions too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.checkpoint import Loaded, text_tokenizer_of
from dalle1.evaluation.likelihood import token_nats
from dalle1.models.transformer import DalleTransformer


class LikelihoodReranker:
    """Scores are in nats."""

    def __init__(self, transformer: Loaded[DalleTransformer], of: Literal["image", "caption"]) -> None:
        """Rank by the likelihood `of` the picture or of the caption.

        Raises: ValueError if its checkpoint has no text tokenizer, or for captions if it was trained without
            caption dropout.
        """
        if of == "caption" and not transformer.caption_dropout:
            raise ValueError(
                "rerank=caption_likelihood needs a transformer trained with optim.caption_dropout > 0, this one was "
                "not; take rerank=image_likelihood"
            )
        self._transformer, self._of = transformer, of
        self._tokenizer = text_tokenizer_of(transformer, "transformer")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Hash and training steps of the weights."""
        return {
            "kind": f"{self._of}_likelihood",
            "sha256": self._transformer.sha256,
            "step": self._transformer.step,
        }

    def to(self, device: torch.device) -> None:
        """Move the transformer."""
        self._transformer.model.to(device)

    def check(self, prompt: str) -> None:
        """Raise ValueError if the prompt is longer than the transformer's captions."""
        self._tokenizer.check_length(self._tokenizer.ids(prompt), prompt)

    def score(
        self, prompt: str, images: Float[Tensor, "n 3 h w"], image_tokens: Int[Tensor, "n gh gw"]
    ) -> Float[Tensor, " n"]:
        """Log-likelihoods; the pictures are not used."""
        score = -self._image_nats(self._tokenizer.encode([prompt]), image_tokens)
        if self._of == "caption":
            score += self._image_nats(self._transformer.model.empty_text(), image_tokens)
        return score

    def _image_nats(self, text: Int[Tensor, "1 t"], image_tokens: Int[Tensor, "n gh gw"]) -> Float[Tensor, " n"]:
        nats = token_nats(self._transformer.model, text.expand(len(image_tokens), -1), image_tokens)
        return nats.image.double().sum((1, 2))
