"""A frozen dVAE as a tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dalle1.models.dvae import DVAE
from dalle1.tokenizers.image import ImageTokenizer


def test_image_tokenizer_freezes_its_dvae(make_dvae: Callable[..., DVAE]) -> None:
    dvae = make_dvae().train()
    ImageTokenizer(dvae, sha256="0")
    assert not dvae.training
    assert not any(parameter.requires_grad for parameter in dvae.parameters())


def test_encode_and_decode_are_those_of_the_dvae(make_dvae: Callable[..., DVAE]) -> None:
    dvae = make_dvae()
    tokenizer = ImageTokenizer(dvae, sha256="0")
    image = torch.rand(2, 3, 12, 16)
    tokens = tokenizer.encode(image)
    assert torch.equal(tokens, dvae.encode(image))
    assert torch.equal(tokenizer.decode(tokens), dvae.decode(tokens))
    assert int(tokens.max()) < tokenizer.vocab_size


def test_grid_size_is_the_side_over_the_downsampling(make_dvae: Callable[..., DVAE]) -> None:
    assert ImageTokenizer(make_dvae(), sha256="0").grid_size(20) == 5


@pytest.mark.parametrize("side", [0, 3, 18])
def test_grid_size_refuses_a_side_that_the_downsampling_does_not_divide(
    make_dvae: Callable[..., DVAE], side: int
) -> None:
    with pytest.raises(ValueError, match=f"must be a multiple of 4, the dVAE's downsampling, got {side}"):
        ImageTokenizer(make_dvae(), sha256="0").grid_size(side)
