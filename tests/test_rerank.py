"""Ranking pictures with CLIP."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dalle1.models.clip import CLIP
from dalle1.rerank import best_first, score_images
from dalle1.tokenizers.text import TextTokenizer


def test_scores_are_the_cosines_of_the_features(make_clip: Callable[..., CLIP], text_tokenizer: TextTokenizer) -> None:
    clip = make_clip()
    images, text = torch.rand(5, 3, 12, 16), text_tokenizer.encode(["a red circle"])
    scores = score_images(clip, images, text[0], batch_size=2)
    expected = torch.cosine_similarity(clip.image_tower(images), clip.text_tower(text))
    torch.testing.assert_close(scores, expected)
    assert scores.abs().max() <= 1


def test_best_first_sorts_down_and_keeps_the_order_of_equals() -> None:
    assert best_first(torch.tensor([0.1, 0.5, -1.0, 0.5])) == [1, 3, 0, 2]
