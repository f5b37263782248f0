"""What a training step of the transformer learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer
from dalle1.training.transformer_module import TransformerModule, TransformerOptimConfig


@pytest.fixture
def make_module(
    make_transformer: Callable[..., DalleTransformer],
    make_dvae: Callable[..., DVAE],
    text_tokenizer: TextTokenizer,
    optim_numbers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., TransformerModule]:
    """A module whose logged values are in `logged`; keywords go to its optimizer configuration."""

    def make(**options: object) -> TransformerModule:
        transformer = make_transformer(
            text_vocab_size=text_tokenizer.vocab_size, text_seq_len=text_tokenizer.seq_len
        ).requires_grad_(True)
        module = TransformerModule(
            transformer,
            TransformerOptimConfig(**(optim_numbers | options)),
            seed=0,
            image_tokenizer=ImageTokenizer(make_dvae(), sha256="x"),
            text_tokenizer=text_tokenizer,
        )
        monkeypatch.setattr(module, "log_means", lambda split, values, size: setattr(module, "logged", values))
        return module

    return make


def batch_of(module: TransformerModule, n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config, factor = module.model.config, module.image_tokenizer.dvae.config.downsampling
    image = torch.rand(n, 3, config.grid_height * factor, config.grid_width * factor, generator=generator)
    assert module.text_tokenizer is not None
    captions = ["a red circle", "a blue square on the left", "two green stars", "a red square"]
    text = module.text_tokenizer.encode([captions[i % 4] for i in range(n)])
    return {"image": image, "text_tokens": text, "index": torch.arange(n)}


def nats(module: TransformerModule, batch: dict[str, Tensor], dropped: Tensor | None) -> tuple[float, float]:
    tokens = module.image_tokenizer.encode(batch["image"]).flatten(1).clone()
    module._step("train", batch, tokens, dropped)
    return module.logged["text_nats_per_token"].item(), module.logged["image_nats_per_token"].item()


def test_dropped_captions_are_neither_input_nor_target(make_module: Callable[..., TransformerModule]) -> None:
    module = make_module()
    batch = batch_of(module, 4)
    text, image = nats(module, batch, None)
    all_dropped = torch.ones(4, 1, dtype=torch.bool)
    text_dropped, image_dropped = nats(module, batch, all_dropped)
    assert text > 0
    assert text_dropped == 0
    assert image_dropped != image
    # Another caption changes nothing then.
    other = batch | {"text_tokens": batch["text_tokens"].flip(0)}
    assert nats(module, other, all_dropped) == (text_dropped, image_dropped)
    assert nats(module, other, None) != (text, image)


def test_share_of_dropped_captions(
    make_module: Callable[..., TransformerModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(caption_dropout=0.25)
    seen: list[Tensor] = []
    monkeypatch.setattr(module, "_step", lambda split, batch, tokens, dropped: seen.append(dropped))
    monkeypatch.setattr(TransformerModule, "global_rank", 0)
    monkeypatch.setattr(TransformerModule, "global_step", 3)
    batch = batch_of(module, 400)
    module.training_step(batch, 0)
    module.training_step(batch, 0)
    assert torch.equal(seen[0], seen[1]), "the same step drops the same captions, also after a resume"
    # 100 expected with a standard deviation of 8.7: outside by chance once in 10^8.
    assert 50 < int(seen[0].sum()) < 150


def test_no_caption_is_dropped_by_default(
    make_module: Callable[..., TransformerModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module()
    monkeypatch.setattr(module, "_step", lambda split, batch, tokens, dropped: dropped)
    assert module.training_step(batch_of(module, 2), 0) is None


def test_caption_dropout_out_of_range_is_refused(optim_numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"optim.caption_dropout must be in \[0, 1\), got 1"):
        TransformerOptimConfig(**(optim_numbers | {"caption_dropout": 1.0}))
