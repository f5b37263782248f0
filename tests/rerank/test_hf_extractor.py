"""CLIP and SigLIP of transformers as feature extractors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_models import KINDS, PROMPT, edit_json, make_images, score

from dalle1.evaluation.extractors import load_extractor
from dalle1.rerank.hf_clip import HFCLIPReranker


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_the_cosines_of_the_reranker(
    kind: str, models: Callable[[str], Path], rerankers: dict[str, HFCLIPReranker]
) -> None:
    extractor = load_extractor(f"hf:{models(kind)}")
    assert extractor.name.startswith(f"hf-{'clip' if kind == 'clip' else 'siglip'}-")
    # Of two sizes, both not the model's.
    images = [*make_images(2, 40, 56), *make_images(1, 33, 31, seed=1)]
    pictures = [(image * 255).round().to(torch.uint8) for image in images]
    result = extractor(pictures)
    assert result.features.shape == (3, extractor.n_features)
    assert result.probabilities is None
    cosines = torch.nn.functional.normalize(result.features, dim=1) @ extractor.text_features([PROMPT])[0]
    expected = [score(rerankers[kind], picture[None] / 255) for picture in pictures]
    assert torch.allclose(cosines, torch.cat(expected), atol=1e-5)
    assert not torch.allclose(result.features.norm(dim=1), torch.ones(3))


def test_name_changes_with_the_preprocessing(copy: Callable[[str], Path]) -> None:
    directory = copy("clip")
    before = load_extractor(f"hf:{directory}").name
    edit_json(directory / "preprocessor_config.json", resample=2)
    assert load_extractor(f"hf:{directory}").name != before


def test_messages_are_those_of_an_extractor(copy: Callable[[str], Path]) -> None:
    directory = copy("clip")
    extractor = load_extractor(f"hf:{directory}")
    with pytest.raises(ValueError, match=r"shorten it or take another extractor$"):
        extractor.text_features(["a long caption " * 40])
    edit_json(directory / "config.json", model_type="bert")
    with pytest.raises(ValueError, match=r"must be a CLIP, SigLIP or DINOv2 .* it has model_type 'bert'"):
        load_extractor(f"hf:{directory}")
