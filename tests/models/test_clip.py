"""The contrastive model: features that depend on what they should depend on, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dalle1.models.clip import CLIP, CLIPConfig
from dalle1.tokenizers.text import TextTokenizer

MakeCLIP = Callable[..., CLIP]


def test_features_have_unit_length(make_clip: MakeCLIP, text_tokenizer: TextTokenizer) -> None:
    clip = make_clip()
    image = clip.encode_image(torch.rand(3, 3, 16, 16))
    text = clip.encode_text(text_tokenizer.encode(["a red circle", "a blue square"]))
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))


def test_caption_feature_ignores_padding(make_clip: MakeCLIP, text_tokenizer: TextTokenizer) -> None:
    clip = make_clip()
    tokens = text_tokenizer.encode(["a red circle"])
    other = tokens.where(tokens < text_tokenizer.vocab_size, text_tokenizer.vocab_size)
    assert not torch.equal(tokens, other)
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(other))


def test_caption_feature_depends_on_every_word(make_clip: MakeCLIP, text_tokenizer: TextTokenizer) -> None:
    clip = make_clip()
    features = clip.encode_text(text_tokenizer.encode(["a red circle", "a red square", "a blue circle", "red circle"]))
    distances = torch.cdist(features, features)
    assert (distances[~torch.eye(4, dtype=torch.bool)] > 1e-3).all()


def test_caption_may_fill_all_positions(make_clip: MakeCLIP) -> None:
    clip = make_clip()
    tokens = torch.arange(clip.config.text_seq_len)[None]
    last_changed = tokens.clone()
    last_changed[0, -1] = 99
    assert not torch.allclose(clip.encode_text(tokens), clip.encode_text(last_changed))


def test_features_do_not_depend_on_the_batch(make_clip: MakeCLIP, text_tokenizer: TextTokenizer) -> None:
    clip = make_clip()
    images = torch.rand(5, 3, 16, 16)
    tokens = text_tokenizer.encode(["a red circle", "b", "a blue square on the left"])
    # Equal up to rounding: matrix products sum in another order for another number of rows.
    torch.testing.assert_close(clip.encode_image(images)[3:4], clip.encode_image(images[3:4]), atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.encode_text(tokens)[1:2], clip.encode_text(tokens[1:2]), atol=1e-5, rtol=0)


def test_pictures_of_another_size_are_resized(make_clip: MakeCLIP) -> None:
    clip = make_clip()
    plain = torch.tensor([0.2, 0.5, 0.9])[None, :, None, None]
    small = clip.encode_image(plain.expand(1, 3, 16, 16))
    large = clip.encode_image(plain.expand(1, 3, 40, 24))
    torch.testing.assert_close(small, large)


def test_text_of_another_length_is_refused(make_clip: MakeCLIP) -> None:
    with pytest.raises(ValueError, match="text must have 40 tokens, got 5"):
        make_clip().encode_text(torch.zeros(1, 5, dtype=torch.int64))


def test_logit_scale_starts_at_1_over_007_and_is_at_most_100(make_clip: MakeCLIP) -> None:
    fresh = CLIP(make_clip().config)
    assert fresh.logit_scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        fresh.log_scale.fill_(50)
    fresh.limit_scale()
    assert fresh.logit_scale.item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"image_size": 30, "patch_size": 8}, r"image_size must be a multiple of patch_size \(8\), got 30"),
        ({"text_width": 10, "text_heads": 3}, r"text_width must be a multiple of text_heads \(3\), got 10"),
        ({"embed_dim": 0}, "embed_dim must be >= 1, got 0"),
    ],
)
def test_config_refuses_a_wrong_value(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**option)
