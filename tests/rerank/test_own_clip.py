"""Ranking pictures with our own CLIP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle1.checkpoint import load_clip
from dalle1.rerank import own_clip
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.rerank.reranker import best_first
from dalle1.tokenizers.text import TextTokenizer

NO_TOKENS = torch.zeros(5, 3, 4, dtype=torch.int64)


def test_scores_are_the_cosines_of_the_features(
    checkpoints: dict[str, Path], text_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_clip, "_BATCH_SIZE", 2)
    loaded = load_clip(checkpoints["clip"])
    images = torch.rand(5, 3, 12, 16)
    scores = CLIPReranker(loaded).score("a red circle", images, NO_TOKENS)
    with torch.inference_mode():
        text = loaded.model.text_tower(text_tokenizer.encode(["a red circle"]))
        expected = torch.cosine_similarity(loaded.model.image_tower(images), text)
    torch.testing.assert_close(scores, expected)
    assert scores.abs().max() <= 1


def test_best_first_sorts_down_and_keeps_the_order_of_equals() -> None:
    assert best_first(torch.tensor([0.1, 0.5, -1.0, 0.5])) == [1, 3, 0, 2]


def test_facts_name_the_weights(checkpoints: dict[str, Path]) -> None:
    loaded = load_clip(checkpoints["clip"])
    assert CLIPReranker(loaded).facts == {"kind": "clip", "sha256": loaded.sha256, "step": 7}


def test_prompt_that_is_too_long_is_refused(checkpoints: dict[str, Path]) -> None:
    reranker = CLIPReranker.load(checkpoints["clip"])
    reranker.check("z" * 40)
    with pytest.raises(ValueError, match="prompt must have at most 40 tokens, as the CLIP was trained with, got 41"):
        reranker.check("z" * 41)


def test_missing_clip_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no CLIP at '.*'; train it \(stage=clip\), .* rerank=none"):
        CLIPReranker.load(tmp_path / "no.ckpt")


def test_clip_without_a_text_tokenizer_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="the CLIP checkpoint must hold a text tokenizer, it has none"):
        CLIPReranker(replace(load_clip(checkpoints["clip"]), text_tokenizer=None))
