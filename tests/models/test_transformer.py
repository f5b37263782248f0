"""The transformer: causality, decoding with a cache, losses, how blocks are executed, sizes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.models.accounting import count_weights
from dalle1.models.options import AttentionBackend, AttentionPattern
from dalle1.models.transformer import Block, DalleTransformer, TransformerConfig

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


@pytest.mark.parametrize("start", ["one", "two"])
@pytest.mark.parametrize("backend", ["dense", "local"])
@pytest.mark.parametrize("pattern", ["row", "column", "conv", "full"])
def test_no_logit_depends_on_its_own_or_a_later_token(
    make_transformer: MakeTransformer, pattern: AttentionPattern, backend: AttentionBackend, start: str
) -> None:
    model = make_transformer(**SMALL, n_layers=2, attention=(pattern, pattern), start=start)
    model.attention_backend = backend
    embedded: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.text_embedding.register_forward_hook(keep)
    model.image_embedding.register_forward_hook(keep)
    text_logits, image_logits = model(*_tokens(model, 1))
    stream = [*text_logits[0], *image_logits[0]]
    # Of a caption that fills all positions the last token is no input if the image has a start of its own.
    seen_text = SMALL["text_seq_len"] - (1 if start == "two" else 0)
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
            assert (gradient[:seen_text] != 0).any(dim=1).all(), "image positions see all text"


@pytest.mark.parametrize("options", [{}, {"start": "two"}, {"padding": "shared"}], ids=str)
def test_losses_and_their_gradients_are_those_of_the_logits(
    make_transformer: MakeTransformer, options: dict[str, Any]
) -> None:
    model = make_transformer(**options).double().requires_grad_(True)
    text, image = _tokens(model, 2)
    generator = torch.Generator().manual_seed(9)
    text_weights, image_weights = (torch.rand(each.shape, generator=generator).double() for each in (text, image))
    losses = model.losses(text, image, text_weights=text_weights, image_weights=image_weights)
    classes = text.clamp(max=model.config.text_classes - 1)
    text_logits, image_logits = model(text, image)
    expected = 0.0
    for logits, targets, weights, nats, correct in (
        (text_logits, classes, text_weights, losses.text_nats, losses.text_correct),
        (image_logits, image, image_weights, losses.image_nats, losses.image_correct),
    ):
        wanted = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        torch.testing.assert_close(nats, wanted)
        assert torch.equal(correct, logits.argmax(-1) == targets)
        expected = expected + (wanted * weights).sum()
    torch.testing.assert_close(losses.loss, expected)
    parameters = list(model.parameters())
    for got, wanted in zip(
        torch.autograd.grad(losses.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_blocks_that_are_computed_again_give_the_same_gradients(make_transformer: MakeTransformer) -> None:
    model = make_transformer(dropout=0.3).requires_grad_(True).train()
    text, image = _tokens(model, 2)
    gradients = []
    for recompute in (False, True):
        model.execute_blocks(recompute=recompute)
        torch.manual_seed(3)  # of the dropout
        logits = torch.cat([each.flatten() for each in model(text, image)])
        gradients.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.filterwarnings("ignore")  # of the tracer
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["dense", "local", "flex"])
def test_every_block_compiles_as_one_graph(
    make_transformer: MakeTransformer, monkeypatch: pytest.MonkeyPatch, backend: AttentionBackend, recompute: bool
) -> None:
    model = make_transformer(n_layers=8, d_model=32).requires_grad_(True).train()
    text, image = _tokens(model, 1)
    model.attention_backend = "dense"
    expected = torch.autograd.grad(model(text, image)[1].square().sum(), model.blocks[0].parameters())
    monkeypatch.setattr("dalle1.models.transformer.resolve_backend", lambda *_, **__: backend)
    # FlexAttention's uncompiled form has a backward pass on a CPU, but refuses to be asked for it.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(Block, "compile", partialmethod(Block.compile, backend="eager"))
    model.execute_blocks(recompute=recompute, compiled=True)
    logits = model(text, image)[1]
    assert not counters["graph_break"]
    # Row, column and convolution; with `local` the window of rows on this grid is that of the convolution.
    assert counters["stats"]["unique_graphs"] <= 3
    for got, wanted in zip(
        torch.autograd.grad(logits.square().sum(), model.blocks[0].parameters()), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_model_that_was_only_looked_at_can_be_trained(make_transformer: MakeTransformer) -> None:
    fresh, model = make_transformer().requires_grad_(True), make_transformer().requires_grad_(True)
    text, image = _tokens(model, 1)
    with torch.inference_mode():
        model(text, image)
    gradients = [
        torch.autograd.grad(each(text, image)[1].square().sum(), each.blocks.parameters()) for each in (model, fresh)
    ]
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


def test_a_model_that_has_run_can_be_pickled(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    text, image = _tokens(model, 1)
    expected = model(text, image)[1]
    # As a compiled mask function is.
    model._attends["row", "flex", torch.device("cpu")] = lambda qkv: qkv
    assert torch.equal(pickle.loads(pickle.dumps(model))(text, image)[1], expected)


def test_blocks_can_be_run_uncompiled_again(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    model.execute_blocks(compiled=True)
    assert model.blocks[0]._compiled_call_impl is not None
    model.execute_blocks()
    assert model.blocks[0]._compiled_call_impl is None


def test_dropout_is_for_training_alone(make_transformer: MakeTransformer) -> None:
    model = make_transformer(dropout=0.5)
    text, image = _tokens(model, 1)
    assert torch.equal(model(text, image)[1], model(text, image)[1])
    model.train()
    assert not torch.equal(model(text, image)[1], model(text, image)[1])


def test_image_start_has_the_place_of_the_last_caption_token(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SMALL, start="two")
    assert model.config.layout.text_states == 3
    assert model.config.layout.image_states == 6
    text, image = _tokens(model, 1)
    other = text.clone()
    other[0, -1] = 4
    assert torch.equal(model(text, image)[1], model(other, image)[1])


def test_padding_can_share_one_vector(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SMALL, padding="shared", padding_has_position=False)
    assert model.text_embedding.num_embeddings == 10 + 1
    states = model.embed_text(model.empty_text())[0, 1:]
    assert torch.equal(states[0], states[1])
    model = make_transformer(**SMALL, padding="shared")
    states = model.embed_text(model.empty_text())[0, 1:]
    assert not torch.equal(states[0], states[1])


def test_padding_at_each_position_has_its_own_vector(make_transformer: MakeTransformer) -> None:
    model = make_transformer(**SMALL)
    text, image = _tokens(model, 1)
    other = text.clone()
    other[0, -1] = 0
    assert not torch.equal(model(text, image)[1], model(other, image)[1])
    assert model.text_embedding.num_embeddings == 10 + 3


def test_paper_configuration_has_12_billion_parameters() -> None:
    with torch.device("meta"):
        weights = count_weights(DalleTransformer(TransformerConfig()))
    assert 12.0e9 < weights.blocks < 12.2e9
    assert weights.total == weights.blocks + weights.embeddings + weights.heads


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
        ({"attention": "sparse"}, ValueError, "attention must be paper, full or a list of patterns, got 'sparse'"),
        ({"attention": ["row"]}, ValueError, "a pattern for each of n_layers = 64 layers, got 1 of them"),
        ({"attention": ["diagonal"] * 64}, ValueError, "must be one of row, column, conv, full, got 'diagonal'"),
        ({"attention": 3}, ValueError, "attention must be paper, full or a list of patterns, got 3"),
        ({"start": "three"}, ValueError, "start must be one of one, two, got 'three'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be >= 1, got 0"),
        ({"norm_eps": 0.0}, ValueError, "norm_eps must be a finite number > 0, got 0.0"),
        ({"conv_kernel_size": 2}, ValueError, "conv_kernel_size must be odd and >= 1, got 2"),
        ({"n_heads": "2"}, TypeError, "n_heads must be a whole number, got '2'"),
    ],
)
def test_config_refuses_a_wrong_value(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TransformerConfig(**option)
