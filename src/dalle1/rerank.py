"""Rank pictures by how well they fit a prompt, with a contrastive model (Ramesh et al. 2021, sec. 2.6)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle1.models.clip import CLIP


@torch.inference_mode()
def score_images(
    clip: CLIP, images: Float[Tensor, "n 3 h w"], text_tokens: Int[Tensor, " t"], *, batch_size: int = 64
) -> Float[Tensor, " n"]:
    """Cosine similarity in [-1, 1] of each picture in [0, 1] with one caption; higher fits better.

    The caption's tokens are those of the CLIP's own text tokenizer.
    """
    text_feature = clip.encode_text(text_tokens[None])[0]
    scores = [clip.encode_image(part) @ text_feature for part in torch.split(images, batch_size)]
    # Rounding can carry a cosine just beyond its bounds.
    return torch.cat(scores).clamp(-1, 1)


def best_first(scores: Float[Tensor, " n"]) -> list[int]:
    """Numbers of the pictures from the highest score to the lowest; equal ones keep their order."""
    return [int(i) for i in scores.argsort(descending=True, stable=True)]
