"""From the image tokens of a prompt's candidates to its best pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.rerank.reranker import Reranker, best_first
from dalle1.sampling.image_prompt import ImagePrompt
from dalle1.tokenizers.image import ImageTokenizer

_RANKED_AT_ONCE = 64  # pictures that are decoded and then scored, so that both are seen to go on
_DECODED_AT_ONCE = 16  # on a GPU


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptResult:
    """What is kept of a prompt's candidates: best first if they were scored, else in the order of their numbers."""

    prompt: str
    images: Float[Tensor, "n 3 h w"]  # float32 in [0, 1], on the CPU
    image_tokens: Int[Tensor, "n gh gw"]  # int64, on the CPU
    candidates: list[int]  # their numbers, from 0
    scores: list[float] | None  # of the reranker, higher is better; None without one
    sampled: int  # candidates that these were chosen from


def decode_and_rank(
    prompt: str,
    image_tokens: Int[Tensor, "n gh gw"],
    *,
    image_tokenizer: ImageTokenizer,
    reranker: Reranker | None = None,
    keep: int | None = None,
    image_prompt: ImagePrompt | None = None,
    device: torch.device,
    on_finished: Callable[[int], None] | None = None,
) -> PromptResult:
    """Pictures of one prompt's candidates: decoded, scored and ordered, the first `keep` of them.

    Args:
        prompt: What they were sampled for.
        image_tokens: Of candidates 0 to n - 1.
        image_tokenizer: Decodes them.
        reranker: Scores them; without one they keep their order.
        keep: At least 1; all by default.
        image_prompt: What they were sampled from, whose pixels may be put over them.
        device: Where the models are.
        on_finished: Called with the number of pictures that were decoded so far, after each.

    Raises: ValueError if scores are not finite.
    """
    # On a CPU one picture at a time: large pictures need little memory so, and none depends on the others.
    at_once = _DECODED_AT_ONCE if device.type == "cuda" else 1
    images: dict[int, Float[Tensor, "1 3 h w"]] = {}
    scores, order = torch.zeros(0), list[int]()
    for first in range(0, len(image_tokens), _RANKED_AT_ONCE):
        tokens = image_tokens[first : first + _RANKED_AT_ONCE]
        decoded = []
        for part in torch.split(tokens, at_once):
            decoded.append(image_tokenizer.decode(part.to(device)).cpu())
            if on_finished:
                on_finished(first + sum(map(len, decoded)))
        part = torch.cat(decoded) if image_prompt is None else image_prompt.paste(torch.cat(decoded))
        images |= {first + i: image.clone() for i, image in enumerate(torch.split(part, 1))}
        # Without a score candidates keep their order.
        new = reranker.score(prompt, part, tokens) if reranker else torch.zeros(len(tokens))
        if not bool(new.isfinite().all()):
            raise ValueError(f"scores must be finite numbers, some of {prompt[:60]!r} are not; rank in another way")
        scores = torch.cat([scores, new])
        order = best_first(scores)[:keep]
        # Of 512 candidates and 32 to keep, few pictures are in memory.
        images = {i: images[i] for i in order}
    return PromptResult(
        prompt=prompt,
        images=torch.cat([images[i] for i in order]),
        image_tokens=image_tokens[order],
        candidates=order,
        scores=scores[order].tolist() if reranker else None,
        sampled=len(image_tokens),
    )
