"""The transformer: its attention against loops, decoding with a cache, causality, sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.models.kv_cache import KVCache
from dalle1.models.options import AttentionPattern
from dalle1.models.transformer import Attention, DalleTransformer, TransformerConfig

MakeTransformer = Callable[..., DalleTransformer]
SMALL: dict[str, Any] = {
    "text_vocab_size": 10,
    "image_vocab_size": 7,
    "text_seq_len": 3,
    "grid_height": 2,
    "grid_width": 3,
}


def _tokens(model: DalleTransformer, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    config = model.config
    text = torch.randint(config.text_vocab_size, (batch, config.text_seq_len), generator=generator)
    text[:, -1] = config.text_vocab_size + config.text_seq_len - 1  # padding
    return text, torch.randint(config.image_vocab_size, (batch, config.image_seq_len), generator=generator)


def test_attention_equals_a_loop_over_heads_and_queries(make_transformer: MakeTransformer) -> None:
    attention: Attention = make_transformer(**SMALL).blocks[0].attention  # type: ignore[assignment]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(5, dtype=torch.bool)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    mixed = torch.zeros_like(x)
    for sequence in range(2):
        for head in (slice(0, 8), slice(8, 16)):
            for query in range(5):
                keys = [key for key in range(5) if mask[query, key]]
                scores = torch.stack([q[sequence, query, head] @ k[sequence, key, head] for key in keys]) / 8**0.5
                weights = scores.softmax(0)
                for weight, key in zip(weights, keys, strict=True):
                    mixed[sequence, query, head] += weight * v[sequence, key, head]
    torch.testing.assert_close(attention(x, mask), attention.out(mixed))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"attention": "paper"}, {"attention": "paper", "conv_offsets": "raster"}, {"attention": "full"}],
    ids=lambda options: "-".join(options.values()),
)
def test_logits_with_a_cache_equal_logits_without_at_every_position(
    make_transformer: MakeTransformer, options: dict[str, str], batch: int
) -> None:
    model = make_transformer(**options)
    text, image = _tokens(model, batch)
    with torch.inference_mode():
        _, expected = model(text, image)
        logits, cache = model.prefill(text)
        for position in range(model.config.image_seq_len):
            # Equal up to rounding: matrix products sum in another order for another number of rows.
            torch.testing.assert_close(logits, expected[:, position], atol=2e-5, rtol=1e-4)
            if position < model.config.image_seq_len - 1:
                logits = model.decode(image[:, position], cache)


@pytest.mark.parametrize("pattern", ["row", "column", "conv", "full"])
def test_no_logit_depends_on_its_own_or_a_later_token(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch, pattern: AttentionPattern
) -> None:
    monkeypatch.setattr(TransformerConfig, "layer_patterns", property(lambda config: (pattern,) * config.n_layers))
    model = make_transformer(**SMALL, n_layers=2)
    embedded: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.text_embedding.register_forward_hook(keep)
    model.image_embedding.register_forward_hook(keep)
    text_logits, image_logits = model(*_tokens(model, 1))
    stream = [*text_logits[0], *image_logits[0]]
    for position, logits in enumerate(stream):
        for tensor in embedded:
            tensor.grad = None
        # A fixed random direction: the plain sum of logits can have a gradient of 0 for other reasons.
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(position))
        (logits @ direction).backward(retain_graph=True)
        gradients = [tensor.grad[0] for tensor in embedded if tensor.grad is not None]
        gradient = torch.cat(gradients)  # (text and all image tokens but the last, d)
        assert (gradient[position:] == 0).all()
        if position >= SMALL["text_seq_len"]:
            assert (gradient[: SMALL["text_seq_len"]] != 0).any(dim=1).all(), "image positions see all text"


def test_masks_of_a_layer_follow_its_pattern(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SMALL)
    mask = model.mask("column", torch.device("cpu"))
    assert mask.shape == (10, 10)
    assert mask[4:, 4:].nonzero().tolist() == [
        [query, key] for query in range(6) for key in range(query + 1) if query % 3 == key % 3
    ]


def test_padding_at_each_position_has_its_own_vector(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SMALL)
    text, image = _tokens(model, 1)
    other = text.clone()
    other[0, -1] = 0
    assert not torch.equal(model(text, image)[1], model(other, image)[1])
    assert model.text_embedding.num_embeddings == 10 + 3


def test_cat_of_caches_continues_every_sequence(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    text, image = _tokens(model, 2)
    with torch.inference_mode():
        caches = [model.prefill(text[i : i + 1])[1] for i in (0, 1)]
        together = model.decode(image[[0, 1, 0], 0], KVCache.cat([caches[0], caches[1], caches[0]]))
        alone = [model.decode(image[i : i + 1, 0], cache) for i, cache in enumerate(caches)]
    torch.testing.assert_close(together, torch.cat([alone[0], alone[1], alone[0]]))


def test_paper_configuration_has_12_billion_parameters() -> None:
    with torch.device("meta"):
        counts = DalleTransformer(TransformerConfig()).count_parameters()
    assert 12.0e9 < counts["body"] < 12.2e9
    assert counts["total"] == counts["body"] + counts["embeddings"]


def test_fresh_model_predicts_uniformly() -> None:
    model = DalleTransformer(TransformerConfig(**SMALL, n_layers=1, n_heads=1, d_model=4))
    text_logits, image_logits = model(*_tokens(model, 2))
    assert text_logits.shape == (2, 3, 13)
    assert image_logits.shape == (2, 6, 7)
    assert not text_logits.any()
    assert not image_logits.any()


def test_forward_refuses_text_of_another_length(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SMALL)
    with pytest.raises(ValueError, match=r"text must have 3 tokens \(text_seq_len\), got 4"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64))


def test_forward_refuses_another_grid(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SMALL)
    with pytest.raises(ValueError, match="image must have 2 x 3 = 6 tokens, got 5"):
        model(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"n_layers": 0}, ValueError, "n_layers must be >= 1, got 0"),
        ({"image_vocab_size": 1}, ValueError, "image_vocab_size must be >= 2, got 1"),
        ({"d_model": 10, "n_heads": 4}, ValueError, r"d_model must be a multiple of n_heads \(4\), got 10"),
        ({"attention": "sparse"}, ValueError, "attention must be one of paper, full, got 'sparse'"),
        ({"conv_kernel_size": 2}, ValueError, "conv_kernel_size must be odd and >= 1, got 2"),
        ({"n_heads": "2"}, TypeError, "n_heads must be a whole number, got '2'"),
    ],
)
def test_config_refuses_a_wrong_value(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TransformerConfig(**option)
