"""Decoding with caches: the same logits as without, in any company, from no more than each pattern reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dalle1.models.attention_masks import StreamLayout
from dalle1.models.decoding import Decoder, Decoding
from dalle1.models.kv_cache import ImageStates, Places, count_slots
from dalle1.models.options import AttentionBackend, AttentionPattern, ConvOffsets
from dalle1.models.packed_linear import PackedLinear, RowwiseActivation, can_pack
from dalle1.models.transformer import DalleTransformer, TransformerConfig

MakeTransformer = Callable[..., DalleTransformer]
PATTERNS: tuple[AttentionPattern, ...] = ("row", "column", "conv", "full")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"conv_offsets": "raster"},
    {"attention": "full"},
    {"attention": ("full", "conv", "column", "row")},
    {"start": "two"},
    {"start": "two", "attention": ("column", "column", "conv", "full")},
    {"padding": "shared", "padding_has_position": False},
    {"activation": "gelu", "dropout": 0.5, "mlp_ratio": 2},
    # Rings go around several times.
    {"grid_height": 9, "grid_width": 2},
    {"grid_height": 6, "grid_width": 5, "conv_offsets": "raster", "start": "two"},
    {"grid_height": 1, "grid_width": 7},
    {"grid_height": 7, "grid_width": 1, "conv_kernel_size": 5},
]


def _tokens(model: DalleTransformer, texts: int, pictures: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    config = model.config
    text = torch.randint(config.text_vocab_size, (texts, config.text_seq_len), generator=generator)
    text[:, -1] = config.text_vocab_size + config.text_seq_len - 1  # padding
    return text, torch.randint(config.image_vocab_size, (pictures, config.image_seq_len), generator=generator)


def _logits(decoding: Decoding, image: Tensor) -> Tensor:
    """Logits of every position of given pictures, (r, n, v)."""
    logits = [decoding.logits]
    logits += [decoding.step(column) for column in image[:, :-1].T]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["dense", "local"])
def test_logits_with_caches_equal_logits_without_at_every_position(
    make_transformer: MakeTransformer, options: dict[str, Any], dtype: torch.dtype, backend: AttentionBackend
) -> None:
    model = make_transformer(**options).to(dtype)
    model.attention_backend = backend  # of the logits without; `flex` is compared with `dense` elsewhere
    # Two prompts of three candidates each, and five pictures of no prompt, as guidance has them.
    text, image = _tokens(model, 2, 11)
    with torch.inference_mode():
        decoder = Decoder(model)
        texts = [decoder.prefill(each[None]) for each in (*text, model.empty_text()[0])]
        logits = _logits(Decoding(decoder, [(texts[:2], 3), (texts[2:], 5)]), image)
        whole = torch.cat([text.repeat_interleave(3, 0), model.empty_text().expand(5, -1)])
        expected = model(whole, image)[1]
    # Equal up to rounding: matrix products sum in another order for another number of rows.
    precise = dtype == torch.float64
    torch.testing.assert_close(logits, expected, atol=1e-12 if precise else 2e-5, rtol=1e-12 if precise else 1e-4)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_model": 64},
        {"start": "two"},
        # Widths that are no multiple of what processors take at once.
        {"d_model": 40, "mlp_ratio": 1},
        {"d_model": 24, "n_heads": 1, "mlp_ratio": 1, "activation": "gelu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("candidates", [1, 2, 5, 17, 40])
def test_a_row_has_the_same_bits_in_any_company(
    make_transformer: MakeTransformer,
    options: dict[str, Any],
    candidates: int,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not packed:
        monkeypatch.setattr("dalle1.models.decoding.can_pack", lambda model: False)
        if options.get("mlp_ratio"):
            pytest.skip("only packed models have activations of their own")
    model = make_transformer(**options)
    text, image = _tokens(model, 3, 1)
    with torch.inference_mode():
        decoder = Decoder(model)
        assert decoder.packed is packed
        texts = [decoder.prefill(each[None]) for each in text]
        alone = [_logits(Decoding(decoder, [([each], 1)]), image)[0] for each in texts]
        rows = image.expand(3 * candidates + 3, -1)
        others = _logits(Decoding(decoder, [(texts, candidates), (texts[1:2], 3)]), rows)
    for row, logits in enumerate(others):
        assert torch.equal(logits, alone[row // candidates if row < 3 * candidates else 1])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_activation_of_a_row_does_not_depend_on_the_others(threads: int) -> None:
    # More numbers than one thread takes, in parts that are no multiple of what a processor takes at once.
    x = torch.randn(43, 3072, generator=torch.Generator().manual_seed(0))
    activation = RowwiseActivation(nn.SiLU())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = activation(x)
        alone = torch.cat([activation(row[None]) for row in x])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, nn.functional.silu(x))


def test_a_text_is_not_copied_for_its_candidates(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    decoder = Decoder(model)
    text = decoder.prefill(_tokens(model, 1, 1)[0])
    decoding = Decoding(decoder, [([text], 100)])
    assert decoding._layers[0].texts[0].keys.data_ptr() == text.keys[0].data_ptr()
    assert not decoding.logits.requires_grad


@pytest.mark.parametrize("conv_offsets", ["wrapped", "raster"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (5, 3), (12, 2), (1, 6), (6, 1)])
def test_kept_states_are_those_of_the_mask(
    pattern: AttentionPattern, conv_offsets: ConvOffsets, height: int, width: int
) -> None:
    layout = StreamLayout(
        text_states=2,
        image_states=height * width,
        grid_height=height,
        grid_width=width,
        conv_kernel_size=3,
        conv_offsets=conv_offsets,
    )
    places, shape = Places(layout, pattern, torch.device("cpu")), (1, 1, 1)
    sliced, static = (ImageStates(layout, pattern, shape, torch.zeros(())) for _ in range(2))
    for state, allowed in enumerate(layout.image_mask(pattern)):
        number = torch.full(shape, float(state))
        for states, place in ((sliced, state), (static, places.at(torch.tensor([state])))):
            keys, values, hidden = states.append(place, number, -number)
            assert keys.shape[2] <= count_slots(layout, pattern)
            seen = keys.flatten() if hidden is None else keys.flatten()[~hidden]
            assert sorted(seen.tolist()) == allowed.nonzero().flatten().tolist()
            assert torch.equal(values, -keys)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("options", [{}, {"start": "two"}, {"attention": ("full", "conv", "column", "row")}], ids=str)
@pytest.mark.parametrize("shared", [0, 1, 6, 10])
def test_candidates_that_share_a_beginning_have_the_bits_of_others(
    make_transformer: MakeTransformer,
    options: dict[str, Any],
    shared: int,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not packed:
        monkeypatch.setattr("dalle1.models.decoding.can_pack", lambda model: False)
    model = make_transformer(**options)
    # Two prompts and their pictures without one; every prompt has three candidates, each of them guided.
    text, image = _tokens(model, 2, 12)
    image[:, :shared] = image[:, :shared].view(4, 3, shared)[:, :1].expand(-1, 3, -1).flatten(0, 1)
    with torch.inference_mode():
        decoder = Decoder(model)
        texts = [decoder.prefill(each[None]) for each in (*text, model.empty_text()[0])]
        expected = _logits(Decoding(decoder, [(texts[:2], 3), (texts[2:], 6)]), image)
        prefix = Decoding(decoder, [(texts[:2], 1), (texts[2:], 2)])
        for column in image[::3, :shared].T:
            prefix.step(column)
        decoding = prefix.spread(3)
        assert torch.equal(decoding.logits, expected[:, shared])
        for position, column in enumerate(image[:, shared:-1].T, start=shared + 1):
            assert torch.equal(decoding.step(column), expected[:, position])
        # It can be spread again, as when candidates come in batches.
        assert torch.equal(
            prefix.spread(2).step(image[::3, shared].repeat_interleave(2))[::2], expected[::3, shared + 1]
        )


def test_texts_are_not_copied_where_candidates_part(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    decoder = Decoder(model)
    prefix = Decoding(decoder, [([decoder.prefill(each[None]) for each in _tokens(model, 2, 1)[0]], 1)])
    texts = [decoding._layers[0].texts[0] for decoding in (prefix, prefix.spread(50))]
    assert texts[0].keys.data_ptr() == texts[1].keys.data_ptr()
    assert texts[1].rows == 100
    with pytest.raises(ValueError, match="candidates must be >= 1, got 0"):
        prefix.spread(0)


def test_a_finished_picture_keeps_no_states_and_has_no_next_step(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    decoder, (text, image) = Decoder(model), _tokens(model, 1, 1)
    decoding = Decoding(decoder, [([decoder.prefill(text)], 1)])
    _logits(decoding, image)
    assert not decoding._layers
    for another in (lambda: decoding.step(image[:, -1]), lambda: decoding.spread(2)):
        with pytest.raises(ValueError, match="a picture must not have more than 11 steps: its last token needs none"):
            another()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_logits_of_16_bits_are_near_those_of_32(
    make_transformer: MakeTransformer, dtype: torch.dtype, tolerance: float, static: bool
) -> None:
    model = make_transformer(d_model=64, attention=("row", "column", "conv", "full"), start="two")
    text, image = _tokens(model, 1, 16)
    logits = []
    for decoder in (Decoder(model), Decoder(model, dtype=dtype, static=static)):
        states = decoder.prefill(text)
        logits.append(_logits(Decoding(decoder, [([states], 16)]), image))
    assert (states.keys[0].dtype, logits[1].dtype) == (dtype, torch.float32)
    assert model.blocks[0].mlp[0].weight.dtype == torch.float32, "the model itself stays as it is"
    # In units of how much logits differ: 8 bits, or 11, of every number, and some ten roundings one after the other.
    error = (logits[1] - logits[0]).square().mean().sqrt() / logits[0].std()
    assert error < tolerance
    agreement = (logits[1].argmax(-1) == logits[0].argmax(-1)).float().mean()
    assert agreement > 0.9


def test_only_numbers_with_a_point_are_types_of_weights(make_transformer: MakeTransformer) -> None:
    with pytest.raises(ValueError, match=r"dtype must be a type of floating-point numbers, got torch\.int8"):
        Decoder(make_transformer(), dtype=torch.int8)


def test_slots_of_the_papers_layers() -> None:
    layout = TransformerConfig().layout
    assert {pattern: count_slots(layout, pattern) for pattern in ("row", "column", "full")} == {
        "row": 33,
        "column": 1024,
        "full": 1023,
    }
    # Five lines up, and the wrapped columns of that line.
    assert count_slots(layout, "conv") == 5 * 32 + 31 + 1


def test_packed_layers_share_everything_else(make_transformer: MakeTransformer) -> None:
    model = make_transformer()
    assert can_pack(model)
    packed = Decoder(model).model
    assert not [module for module in packed.blocks.modules() if isinstance(module, nn.Linear)]
    assert isinstance(packed.image_head, PackedLinear)
    assert packed.text_head is model.text_head
    assert packed.image_embedding is model.image_embedding
    assert packed.blocks[0].mlp_norm.weight is model.blocks[0].mlp_norm.weight
    assert isinstance(model.image_head, nn.Linear)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packed.image_head(x), model.image_head(x))


def test_what_hangs_on_a_model_is_left_alone(make_transformer: MakeTransformer) -> None:
    class Owner:
        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("this may be a whole trainer")

        def hook(self, *_: object) -> None:
            calls.append(1)

    calls: list[int] = []
    model = make_transformer()
    text = _tokens(model, 1, 1)[0]
    expected = Decoder(model).prefill(text).logits
    model.blocks[0].register_forward_hook(Owner().hook)
    model.execute_blocks(recompute=True, compiled=True)  # compiling would fail: there is no such hook in a graph
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Decoder(model).prefill(text).logits, expected)
    assert not calls


def test_model_in_training_is_refused(make_transformer: MakeTransformer) -> None:
    with pytest.raises(ValueError, match="must be in evaluation mode to decode, it is in training"):
        Decoder(make_transformer().train())


def test_text_of_another_shape_is_refused(make_transformer: MakeTransformer) -> None:
    decoder = Decoder(make_transformer())
    for shape in ((2, 40), (1, 3)):
        with pytest.raises(ValueError, match=r"text must have shape \(1, text_seq_len\) = \(1, 40\), got"):
            decoder.prefill(torch.zeros(shape, dtype=torch.int64))


def test_other_types_are_not_packed(make_transformer: MakeTransformer) -> None:
    model = make_transformer().double()
    assert not can_pack(model)
    assert Decoder(model).model is model
