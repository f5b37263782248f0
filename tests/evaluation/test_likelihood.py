"""Nats of tokens: an independent cross-entropy of the logits, which of them count, and what depends on what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.evaluation.likelihood import token_nats
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.text import TextTokenizer

CAPTIONS = ["a red circle", "a blue square on the left", "x", "two green stars", "a red star"]


@pytest.fixture
def text_tokens(text_tokenizer: TextTokenizer) -> Tensor:
    return text_tokenizer.encode(CAPTIONS)


@pytest.fixture
def image_tokens() -> Tensor:
    return torch.randint(32, (len(CAPTIONS), 3, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "overrides", [{}, {"start": "two"}, {"padding": "shared"}, {"dropout": 0.5}], ids=lambda value: ",".join(value)
)
def test_nats_are_the_cross_entropy_of_the_logits(
    make_transformer: Callable[..., DalleTransformer],
    text_tokens: Tensor,
    image_tokens: Tensor,
    overrides: dict[str, object],
) -> None:
    transformer = make_transformer(**overrides)
    nats = token_nats(transformer, text_tokens, image_tokens)
    with torch.no_grad():
        text_logits, image_logits = transformer(text_tokens, image_tokens.flatten(1))
    classes = text_tokens.clamp(max=transformer.config.text_classes - 1)
    for row, caption in enumerate(text_tokens.tolist()):
        told = sum(token < 300 for token in caption) + 1
        expected = F.cross_entropy(text_logits[row, :told], classes[row, :told], reduction="none")
        torch.testing.assert_close(nats.text[row, :told], expected)
        assert (nats.text[row, told:] == 0).all()
        likeliest = text_logits[row].argmax(1) == classes[row]
        assert nats.text_correct[row].tolist() == [*likeliest[:told].tolist(), *[False] * (40 - told)]
    expected = F.cross_entropy(image_logits.mT, image_tokens.flatten(1), reduction="none")
    torch.testing.assert_close(nats.image, expected.unflatten(1, (3, 4)))
    assert torch.equal(nats.image_correct.flatten(1), image_logits.argmax(2) == image_tokens.flatten(1))
    assert (nats.text.dtype, nats.image.dtype) == (torch.float32, torch.float32)
    assert torch.equal(nats[1:3].image_correct, nats.image_correct[1:3])
    assert torch.equal(nats[1:3].text, nats.text[1:3])


def test_every_token_of_a_caption_that_fills_the_text_counts(
    make_transformer: Callable[..., DalleTransformer], image_tokens: Tensor
) -> None:
    nats = token_nats(make_transformer(), torch.arange(40)[None], image_tokens[:1])
    assert (nats.text > 0).all()


def test_without_a_caption_only_its_end_counts(
    make_transformer: Callable[..., DalleTransformer], image_tokens: Tensor
) -> None:
    transformer = make_transformer()
    nats = token_nats(transformer, transformer.empty_text(), image_tokens[:1])
    assert (nats.text > 0).tolist() == [[True] + [False] * 39]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batch_size_changes_nothing(
    make_transformer: Callable[..., DalleTransformer], text_tokens: Tensor, image_tokens: Tensor, batch_size: int
) -> None:
    transformer = make_transformer()
    nats = token_nats(transformer, text_tokens, image_tokens, batch_size=batch_size)
    expected = token_nats(transformer, text_tokens, image_tokens, batch_size=5)
    torch.testing.assert_close(nats.text, expected.text)
    torch.testing.assert_close(nats.image, expected.image)


def test_no_token_depends_on_what_comes_after_it(
    make_transformer: Callable[..., DalleTransformer], text_tokens: Tensor, image_tokens: Tensor
) -> None:
    transformer = make_transformer()
    nats = token_nats(transformer, text_tokens, image_tokens)
    other_picture = token_nats(transformer, text_tokens, (image_tokens + 1) % 32)
    torch.testing.assert_close(other_picture.text, nats.text)
    changed = image_tokens.clone()
    changed[:, 1, 2] = (changed[:, 1, 2] + 1) % 32
    other_token = token_nats(transformer, text_tokens, changed)
    torch.testing.assert_close(other_token.image.flatten(1)[:, :6], nats.image.flatten(1)[:, :6])
    assert not torch.equal(other_token.image, nats.image)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_left_as_it_was(
    make_transformer: Callable[..., DalleTransformer], text_tokens: Tensor, image_tokens: Tensor, training: bool
) -> None:
    transformer = make_transformer(dropout=0.5)
    expected = token_nats(transformer, text_tokens, image_tokens)
    transformer.train(training)
    assert torch.equal(token_nats(transformer, text_tokens, image_tokens).image, expected.image)
    assert all(module.training == training for module in transformer.modules())
    # What was made on the way serves training too.
    sum(x.sum() for x in transformer(text_tokens, image_tokens.flatten(1))).backward()


@pytest.mark.parametrize(
    ("captions", "grid", "batch_size", "message"),
    [
        (5, (4, 3), 1, "image must have 3 x 4 tokens, got 4 x 3"),
        (2, (3, 4), 1, "each picture must have a caption, got 2 for 5 pictures"),
        (5, (3, 4), 0, "batch_size must be >= 1, got 0"),
    ],
)
def test_tokens_of_other_shapes_are_refused(
    make_transformer: Callable[..., DalleTransformer],
    text_tokens: Tensor,
    image_tokens: Tensor,
    captions: int,
    grid: tuple[int, int],
    batch_size: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        token_nats(make_transformer(), text_tokens[:captions], image_tokens.view(5, *grid), batch_size=batch_size)
