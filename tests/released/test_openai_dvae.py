"""The released dVAE under our names computes what its files describe, and files that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import official_dvae
import pytest
import torch
from official_dvae import Decoder, Encoder, Sizes
from torch import Tensor

from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.released.openai_dvae import build_dvae, official_name, read_config
from dalle1.released.weights_file import Weights, read_weights

SIZES = Sizes()


@pytest.fixture(scope="module")
def parts() -> tuple[Encoder, Decoder]:
    return official_dvae.make_official(SIZES)


@pytest.fixture
def weights(parts: tuple[Encoder, Decoder]) -> dict[str, Weights]:
    """Both files' content; tests may change it."""
    encoder, decoder = parts
    settings = {"blocks.group_1.block_1.post_gain": 1 / 36, "blocks.group_1.pool.kernel_size": 2, "n_hid": 8}
    return {
        "encoder": Weights(dict(encoder.state_dict()), dict(settings)),
        "decoder": Weights(dict(decoder.state_dict()), {}),
    }


def _compare(model: DVAE, encoder: Encoder, decoder: Decoder, *, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, height, width, generator=generator)
    expected = official_dvae.reference_logits(encoder, image)
    assert expected.std() > 0.1
    torch.testing.assert_close(model.logits(image).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)
    # Any tokens, because those of a random encoder are few.
    tokens = torch.randint(model.config.vocab_size, expected.argmax(1).shape, generator=generator)
    pictures = official_dvae.reference_pictures(decoder, tokens)
    assert pictures.std() > 0.01
    assert pictures.shape == image.shape
    torch.testing.assert_close(model.decode(tokens), pictures, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", official_dvae.FORMS)
def test_logits_and_pictures_are_the_reference_s(tmp_path: Path, parts: tuple[Encoder, Decoder], form: str) -> None:
    encoder, decoder = parts
    model = build_dvae(
        read_weights(official_dvae.save_official(encoder, tmp_path / "encoder", form)),
        read_weights(official_dvae.save_official(decoder, tmp_path / "decoder", form)),
    )
    _compare(model, encoder, decoder, height=12, width=20)


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(groups=1, blocks=1),
        Sizes(groups=2, blocks=3, n_init=16),
        Sizes(groups=4, blocks=2, n_hid=4, n_init=4, vocab=16),
    ],
)
def test_other_sizes_are_read_off_the_weights(sizes: Sizes) -> None:
    encoder, decoder = official_dvae.make_official(sizes, seed=1)
    model = build_dvae(Weights(encoder.state_dict(), {}), Weights(decoder.state_dict(), {}))
    assert model.config == DVAEConfig(
        vocab_size=sizes.vocab,
        n_hid=sizes.n_hid,
        n_init=sizes.n_init,
        n_groups=sizes.groups,
        n_blocks_per_group=sizes.blocks,
    )
    _compare(model, encoder, decoder, height=16, width=8)


def test_names_of_the_released_sizes() -> None:
    """Places, shapes and numbers of weights of the released dVAE, from its own layout."""
    config = DVAEConfig()
    with torch.device("meta"):
        state = DVAE(config).state_dict()
    places = {official_name(name, config): (name, tensor) for name, tensor in state.items()}
    assert len(places) == len(state)
    numbers = {side: [t.numel() for (owner, _), (_, t) in places.items() if owner == side] for side, _ in places}
    assert (len(numbers["encoder"]), sum(numbers["encoder"])) == (74, 53_786_240)
    assert (len(numbers["decoder"]), sum(numbers["decoder"])) == (76, 43_829_766)
    shapes = {place: tuple(tensor.shape) for place, (_, tensor) in places.items()}
    assert shapes["encoder", "blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["encoder", "blocks.group_1.block_1.res_path.conv_1.w"] == (64, 256, 3, 3)
    assert shapes["encoder", "blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert shapes["encoder", "blocks.group_3.block_1.res_path.conv_4.w"] == (1024, 256, 1, 1)
    assert shapes["encoder", "blocks.group_4.block_2.res_path.conv_1.w"] == (512, 2048, 3, 3)
    assert shapes["encoder", "blocks.output.conv.b"] == (8192,)
    assert shapes["decoder", "blocks.input.w"] == (8192, 128)  # ours, turned
    assert shapes["decoder", "blocks.group_1.block_1.id_path.w"] == (2048, 128, 1, 1)
    assert shapes["decoder", "blocks.group_2.block_1.res_path.conv_1.w"] == (256, 2048, 1, 1)
    assert shapes["decoder", "blocks.group_4.block_1.res_path.conv_4.w"] == (256, 64, 3, 3)
    assert shapes["decoder", "blocks.group_4.block_1.id_path.b"] == (256,)
    assert shapes["decoder", "blocks.output.conv.w"] == (6, 256, 1, 1)
    assert ("encoder", "blocks.group_1.block_1.id_path.w") not in places


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_become_fp32(weights: dict[str, Weights], dtype: torch.dtype) -> None:
    for part in weights.values():
        part.tensors.update({name: tensor.to(dtype) for name, tensor in part.tensors.items()})
    model = build_dvae(weights["encoder"], weights["decoder"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = weights["decoder"].tensors["blocks.input.w"].float()[:, :, 0, 0].T
    assert torch.equal(model.codebook, expected)
    assert not model.training


Tensors = dict[str, Tensor]
CONV = "blocks.group_2.block_1.res_path.conv_3.w"


def _drop(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key)


def _put(key: str, *shape: int, value: float = 0.0) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: torch.full(shape, value)})


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        (
            "encoder",
            _drop(CONV),
            f"the encoder's file must hold '{CONV}' of shape .4, 4, 3, 3., which is missing among its 55",
        ),
        ("decoder", _drop("blocks.input.b"), "the decoder's file must hold 'blocks.input.b' of shape .12,., which is"),
        ("decoder", _drop("blocks.output.conv.w"), "decoder's file must hold 'blocks.output.conv.w', which is missing"),
        (
            "encoder",
            lambda tensors: [tensors.pop(key) for key in list(tensors) if ".group_" in key],
            r"the encoder's file must hold 'blocks.group_1.block_1\.\.\.', which is missing",
        ),
        ("encoder", Tensors.clear, "the encoder's file must hold 'blocks.input.w', which is missing among its 0"),
        (
            "encoder",
            _put(CONV, 4, 4, 1, 1),
            rf"the encoder's '{CONV}' must have the shape \(4, 4, 3, 3\), got \(4, 4, 1, 1\)",
        ),
        ("decoder", _put(CONV, 4), rf"the decoder's '{CONV}' must have the shape \(4, 4, 3, 3\), got \(4\)"),
        ("encoder", _put("blocks.input.w", 8, 4, 7, 7), r"must have the shape \(8, 3, 7, 7\), got \(8, 4, 7, 7\)"),
        ("encoder", _put("blocks.input.w", 8), r"must have the shape \(out, in, height, width\), got \(8\)"),
        (
            "decoder",
            _put("blocks.output.conv.w", 3, 8, 1, 1),
            r"must have the shape \(6, 8, 1, 1\), got \(3, 8, 1, 1\)",
        ),
        ("decoder", _put("blocks.output.conv.w", 6, 9, 1, 1), "must have the same n_hid, got 8 and 9"),
        ("encoder", _put("blocks.output.conv.w", 32, 16, 1, 1), r"shape \(32, 32, 1, 1\), got \(32, 16, 1, 1\)"),
        ("encoder", _put("blocks.output.conv.w", 31, 32, 1, 1), "must have the same vocab_size, got 31 and 32"),
        ("encoder", _put("blocks.group_4.block_1.x", 1), "must have the same n_groups, got 4 and 3"),
        ("decoder", _put("blocks.group_3.block_3.x", 1), "must have the same n_blocks_per_group, got 2 and 3"),
        ("decoder", _put("blocks.more", 2, 3), r"must hold 58 weights, it also holds 'blocks\.more' of shape \(2, 3\)"),
        ("encoder", _put(CONV, 4, 4, 3, 3, value=float("nan")), f"encoder's '{CONV}' must be finite, it holds NaN"),
        ("decoder", _put(CONV, 4, 4, 3, 3, value=float("inf")), f"decoder's '{CONV}' must be finite, it holds NaN"),
        (
            "decoder",
            lambda tensors: tensors.update({CONV: torch.zeros(4, 4, 3, 3, dtype=torch.int64)}),
            r"must be floating-point numbers, got torch\.int64",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    weights: dict[str, Weights], side: str, change: Callable[[Tensors], object], message: str
) -> None:
    change(weights[side].tensors)
    with pytest.raises(ValueError, match=message) as raised:
        build_dvae(weights["encoder"], weights["decoder"])
    assert "\n" not in str(raised.value)


def test_too_large_numbers_for_fp32_are_refused(weights: dict[str, Weights]) -> None:
    weights["encoder"].tensors[CONV] = torch.full((4, 4, 3, 3), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"the encoder's '{CONV}' must be finite"):
        build_dvae(weights["encoder"], weights["decoder"])


@pytest.mark.parametrize(
    ("first", "second", "got"),
    [
        ("decoder", "encoder", "got a decoder and an encoder"),
        ("encoder", "encoder", "got an encoder and an encoder"),
        ("decoder", "decoder", "got a decoder and a decoder"),
    ],
)
def test_swapped_files_are_recognised(weights: dict[str, Weights], first: str, second: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"file must hold an encoder and the decoder's a decoder, {got}"):
        build_dvae(weights[first], weights[second])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(SIZES, vocab=16), "the same vocab_size, got 32 and 16"),
        (replace(SIZES, n_hid=16), "the same n_hid, got 8 and 16"),
        (replace(SIZES, groups=2), "the same n_groups, got 3 and 2"),
        (replace(SIZES, blocks=1), "the same n_blocks_per_group, got 2 and 1"),
    ],
)
def test_parts_of_two_dvaes_are_refused(weights: dict[str, Weights], other: Sizes, message: str) -> None:
    decoder = official_dvae.make_official(other)[1].state_dict()
    with pytest.raises(ValueError, match=message):
        read_config(weights["encoder"].tensors, decoder)


def test_no_number_of_groups_makes_a_large_model(weights: dict[str, Weights]) -> None:
    for part in weights.values():
        part.tensors.update({f"blocks.group_{i}.block_1.x": torch.zeros(1) for i in range(100)})
    with pytest.raises(ValueError, match=r"'blocks\.output\.conv\.w' must have the shape \(32, \d{20,}, 1, 1\)"):
        build_dvae(weights["encoder"], weights["decoder"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.group_2.block_1.post_gain", 0.5, "post_gain' must be 0.0277.*, as in the released dVAE, got 0.5"),
        ("blocks.group_1.pool.kernel_size", 3, "kernel_size' must be 2, as in the released dVAE, got 3"),
        ("blocks.group_1.pool.stride", 1, "stride' must be 2, .* got 1"),
        ("blocks.group_1.upsample.scale_factor", 4.0, r"scale_factor' must be 2, .* got 4\.0"),
        ("blocks.group_1.upsample.mode", "bilinear", "mode' must be nearest, .* got 'bilinear'"),
        ("blocks.group_1.upsample.mode", 10**400, "mode' must be nearest, .* got 1000"),
    ],
)
def test_modules_that_compute_something_else_are_refused(
    weights: dict[str, Weights], name: str, value: float | str, message: str
) -> None:
    weights["encoder"].settings[name] = value
    with pytest.raises(ValueError, match=f"the encoder's '.*{message}"):
        build_dvae(weights["encoder"], weights["decoder"])
