"""The discrete VAE: the paper's sizes, shapes, and what encode and decode mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle1.models.dvae import DVAE, DVAEConfig, Upsample, reconstruction
from dalle1.models.pixels import map_pixels, unmap_pixels

MakeDVAE = Callable[..., DVAE]


@pytest.fixture(scope="module")
def paper_dvae() -> DVAE:
    with torch.device("meta"):
        return DVAE(DVAEConfig())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_paper_encoder_has_53786240_parameters(paper_dvae: DVAE) -> None:
    assert _count(paper_dvae.encoder) == 53_786_240


def test_paper_decoder_with_its_codebook_has_43829766_parameters(paper_dvae: DVAE) -> None:
    codebook = paper_dvae.codebook.numel() + paper_dvae.codebook_bias.numel()
    assert _count(paper_dvae.decoder) + codebook == 43_829_766


def test_paper_residual_branches_count_one_64th() -> None:
    assert DVAEConfig().residual_gain == 1 / 64


def _shapes_after_groups(module: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes without batch: after each group (its change of resolution included), then of the output."""
    shapes: list[tuple[int, ...]] = []
    groups: Any = module.groups
    for index in (2, 5, 8, 10):  # two blocks and a change of resolution per group; the last group has none
        groups[index].register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    shapes.append(tuple(module(x).shape[1:]))
    return shapes


def test_paper_encoder_stages_at_256_pixels(paper_dvae: DVAE) -> None:
    assert _shapes_after_groups(paper_dvae.encoder, torch.empty(1, 3, 256, 256, device="meta")) == [
        (256, 128, 128),
        (512, 64, 64),
        (1024, 32, 32),
        (2048, 32, 32),
        (8192, 32, 32),
    ]


def test_paper_decoder_stages_at_32_tokens(paper_dvae: DVAE) -> None:
    assert _shapes_after_groups(paper_dvae.decoder, torch.empty(1, 128, 32, 32, device="meta")) == [
        (2048, 64, 64),
        (1024, 128, 128),
        (512, 256, 256),
        (256, 256, 256),
        (6, 256, 256),
    ]


@pytest.mark.parametrize(
    ("options", "downsampling"),
    [
        ({"patch_size": 4, "n_groups": 1}, 4),
        ({"patch_size": 2, "n_groups": 2}, 4),
        ({"patch_size": 1, "n_groups": 3}, 4),
        ({"patch_size": 1, "n_groups": 4}, 8),
        ({"patch_size": 1, "n_groups": 5}, 16),
    ],
)
def test_encode_and_decode_keep_the_sides_of_a_picture_that_is_not_square(
    make_dvae: MakeDVAE, options: dict[str, int], downsampling: int
) -> None:
    dvae = make_dvae(**options)
    sides = (3 * downsampling, 5 * downsampling)
    tokens = dvae.encode(torch.rand(2, 3, *sides))
    assert tokens.shape == (2, 3, 5)
    assert tokens.dtype == torch.int64
    assert dvae.decode(tokens).shape == (2, 3, *sides)


def test_encode_refuses_sides_that_the_downsampling_does_not_divide(make_dvae: MakeDVAE) -> None:
    with pytest.raises(ValueError, match=r"sides must be multiples of 4 .*, got 12x18"):
        make_dvae().encode(torch.rand(1, 3, 12, 18))


def test_encode_takes_the_most_likely_code(make_dvae: MakeDVAE) -> None:
    dvae = make_dvae()
    image = torch.rand(2, 3, 8, 12)
    logits = dvae.logits(image)
    torch.testing.assert_close(logits, dvae.encoder(map_pixels(image)).permute(0, 2, 3, 1))
    assert torch.equal(dvae.encode(image), logits.argmax(-1))


def test_decode_equals_soft_decoding_of_one_hot_codes(make_dvae: MakeDVAE) -> None:
    dvae = make_dvae()
    tokens = torch.randint(dvae.config.vocab_size, (2, 3, 4))
    one_hot = F.one_hot(tokens, dvae.config.vocab_size).float()
    soft = dvae.decode_vectors(one_hot @ dvae.codebook)
    torch.testing.assert_close(dvae.decode(tokens), reconstruction(soft))


def test_reconstruction_is_in_the_unit_interval_and_ignores_the_scale() -> None:
    parameters = 50 * torch.randn(1, 6, 4, 4)
    image = reconstruction(parameters)
    assert image.min() == 0
    assert image.max() == 1
    parameters[:, 3:] = 0
    assert torch.equal(reconstruction(parameters), image)


def test_unmap_inverts_map_and_clamps() -> None:
    image = torch.linspace(0, 1, 11)
    assert map_pixels(image).min() == pytest.approx(0.1)
    assert map_pixels(image).max() == pytest.approx(0.9)
    torch.testing.assert_close(unmap_pixels(map_pixels(image)), image)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_upsample_repeats_every_pixel() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(Upsample()(x), F.interpolate(x, scale_factor=2))


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"vocab_size": 1}, ValueError, "vocab_size must be >= 2, got 1"),
        ({"n_hid": 6}, ValueError, "n_hid must be .* 4 .*, got 6"),
        ({"n_groups": 0}, ValueError, "n_groups must be >= 1, got 0"),
        ({"post_gain": -1.0}, ValueError, r"post_gain must be >= 0 .*, got -1"),
        ({"patch_size": True}, TypeError, "patch_size must be a whole number, got True"),
    ],
)
def test_config_refuses_a_wrong_value(option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DVAEConfig(**option)


def test_head_and_mixture_of_codes_stay_fp32_under_mixed_precision(make_dvae: MakeDVAE) -> None:
    dvae = make_dvae()
    image = torch.rand(2, 3, 16, 16)
    mixture_seen: list[Tensor] = []
    dvae.decoder.register_forward_pre_hook(lambda module, inputs: mixture_seen.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = dvae.logits(image)
        features = dvae.features(image)
        _, kl = dvae.relaxed(image, temperature=1.0)
    assert features.dtype == torch.bfloat16, "the body runs in low precision"
    assert logits.dtype == mixture_seen[0].dtype == kl.dtype == torch.float32
    head = dvae.encoder.head
    torch.testing.assert_close(logits, F.linear(features.float(), head.weight[:, :, 0, 0], head.bias))


def test_all_maps_are_channels_last(make_dvae: MakeDVAE) -> None:
    dvae = make_dvae(n_groups=3, patch_size=1)
    seen: list[bool] = []
    for module in dvae.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    dvae.relaxed(torch.rand(2, 3, 16, 24), temperature=1.0)
    assert seen
    assert all(seen)
