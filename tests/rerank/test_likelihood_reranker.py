"""Ranking pictures with the transformer's own likelihoods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.checkpoint import Loaded, load_transformer
from dalle1.rerank.choose import load_reranker
from dalle1.rerank.likelihood import LikelihoodReranker
from dalle1.tokenizers.text import TextTokenizer

NO_IMAGES = torch.zeros(6, 3, 12, 16)


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> Loaded[Any]:
    return replace(load_transformer(checkpoints["transformer"]), caption_dropout=0.1)


@pytest.fixture(scope="module")
def image_tokens() -> Tensor:
    return torch.randint(32, (6, 3, 4), generator=torch.Generator().manual_seed(0))


def _log_likelihood(loaded: Loaded[Any], text: Tensor, image_tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits = loaded.model(text.expand(len(image_tokens), -1), image_tokens.flatten(1))[1]
    return -F.cross_entropy(logits.mT, image_tokens.flatten(1), reduction="none").double().sum(1)


def test_image_score_is_its_log_likelihood(
    loaded: Loaded[Any], image_tokens: Tensor, text_tokenizer: TextTokenizer
) -> None:
    scores = LikelihoodReranker(loaded, of="image").score("a red circle", NO_IMAGES, image_tokens)
    torch.testing.assert_close(scores, _log_likelihood(loaded, text_tokenizer.encode(["a red circle"]), image_tokens))


def test_caption_score_is_what_the_picture_adds_to_its_likelihood(
    loaded: Loaded[Any], image_tokens: Tensor, text_tokenizer: TextTokenizer
) -> None:
    scores = LikelihoodReranker(loaded, of="caption").score("a red circle", NO_IMAGES, image_tokens)
    with_caption = _log_likelihood(loaded, text_tokenizer.encode(["a red circle"]), image_tokens)
    without = _log_likelihood(loaded, loaded.model.empty_text(), image_tokens)
    torch.testing.assert_close(scores, with_caption - without, rtol=0, atol=1e-5)


def test_caption_score_needs_pictures_without_captions(loaded: Loaded[Any]) -> None:
    with pytest.raises(ValueError, match=r"optim\.caption_dropout > 0, this one was not; take rerank=image_likelihood"):
        LikelihoodReranker(replace(loaded, caption_dropout=0.0), of="caption")


def test_facts_and_checks(loaded: Loaded[Any]) -> None:
    reranker = LikelihoodReranker(loaded, of="image")
    assert reranker.facts == {"kind": "image_likelihood", "sha256": loaded.sha256, "step": 7}
    with pytest.raises(ValueError, match="at most 40 tokens, got 41"):
        reranker.check("z" * 41)


@pytest.mark.parametrize("kind", ["clip", "caption_likelihood", "image_likelihood"])
def test_reranker_is_chosen_by_name(kind: Any, loaded: Loaded[Any], checkpoints: dict[str, Path]) -> None:
    model = str(checkpoints["clip"]) if kind == "clip" else None
    reranker = load_reranker(kind, model=model, allow_download=False, load_transformer=lambda: loaded)
    assert reranker is not None
    assert reranker.facts["kind"] == kind


def test_none_is_no_reranker() -> None:
    assert load_reranker("none", model=None, allow_download=False, load_transformer=pytest.fail) is None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("best", "rerank must be one of clip, hf_clip, caption_likelihood, image_likelihood, none, got 'best'"),
        ("hf_clip", r"rerank=hf_clip needs a model, got none; give a directory or a name"),
    ],
)
def test_wrong_choice_is_refused(kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_reranker(kind, model=None, allow_download=False, load_transformer=pytest.fail)
