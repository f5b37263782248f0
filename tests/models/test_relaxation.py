"""The relaxation against closed forms and against the same thing written as separate operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.models import relaxation
from dalle1.models.relaxation import gumbel_noise, most_likely_codes, relaxed_codes


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _relax(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Relaxed codes and KL of given logits: features, head and codebook are the identity."""
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return relaxed_codes(
        logits, identity, identity.new_zeros(len(identity)), identity, temperature=temperature, generator=generator()
    )


@pytest.fixture
def inputs() -> list[Tensor]:
    """Features (2, 3, 4, 5), head weight and bias of 7 codes, codebook of width 6; fp64 for exact gradients."""
    draw = generator()
    shapes = ((2, 3, 4, 5), (7, 5), (7,), (7, 6))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


def _separately(features: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor, temperature: float) -> list[Tensor]:
    logits = F.linear(features, weight, bias)
    codes = F.softmax((logits + gumbel_noise(logits.flatten(0, 2), generator()).view_as(logits)) / temperature, dim=-1)
    log_probs = F.log_softmax(logits, dim=-1)
    return [codes @ codebook, (log_probs.exp() * log_probs).sum(-1) + math.log(logits.shape[-1])]


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_values_and_gradients_equal_those_of_separate_operations(inputs: list[Tensor], temperature: float) -> None:
    results = []
    for outputs in (
        relaxed_codes(*inputs, temperature=temperature, generator=generator()),
        _separately(*inputs, temperature=temperature),
    ):
        vectors, kl = outputs
        # Other weights for every element, so that no two gradients are alike.
        loss = (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum()
        loss = loss + (kl * torch.linspace(0.5, 2, kl.numel()).view_as(kl)).sum()
        results.append([vectors, kl, *torch.autograd.grad(loss, inputs)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [5 * 7, 12 * 7, 30 * 7])  # positions of a sample: 12
def test_noise_of_a_sample_with_a_generator_of_its_own_is_the_same_in_any_batch(
    inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setitem(relaxation._CHUNK_ELEMENTS, "cpu", chunk)
    features = torch.cat([inputs[0].detach()] * 2)

    def relax(samples: slice) -> Tensor:
        generators = [torch.Generator().manual_seed(place) for place in range(4)][samples]
        return relaxed_codes(features[samples], *inputs[1:], temperature=0.5, generator=generators)[0]

    whole = relax(slice(0, 4))
    torch.testing.assert_close(torch.cat([relax(slice(0, 1)), relax(slice(1, 4))]), whole, rtol=0, atol=1e-14)
    assert not torch.equal(whole[:2], whole[2:]), "equal samples have other noise"


def test_generators_must_be_as_many_as_samples(inputs: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="a generator for each of the 2 samples, got 3"):
        relaxed_codes(*inputs, temperature=0.5, generator=[generator()] * 3)


def test_chunks_give_the_same_values_and_gradients_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 codes: the CPU's generator draws whole groups of 16 numbers alike, wherever they begin.
    shapes = ((10, 5), (16, 5), (16,), (16, 6))
    parts = [torch.randn(shape, generator=generator(), dtype=torch.float64).requires_grad_() for shape in shapes]
    results = []
    for chunk_elements in (10 * 16, 3 * 16, 1):
        monkeypatch.setattr(relaxation, "_CHUNK_ELEMENTS", {"cpu": chunk_elements})
        vectors, kl = relaxed_codes(*parts, temperature=0.5, generator=generator())
        gradients = torch.autograd.grad(vectors.square().sum() + kl.sum(), parts)
        results.append([vectors, kl, most_likely_codes(*parts[:3]), *gradients])
    for chunked in results[1:]:
        for ours, reference in zip(chunked, results[0], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_kl_of_the_uniform_distribution_is_0() -> None:
    torch.testing.assert_close(_relax(torch.full((2, 5, 8), 3.0))[1], torch.zeros(2, 5), atol=1e-6, rtol=0)


def test_kl_of_one_certain_code_is_ln_k() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 3] = 100
    assert _relax(logits)[1].item() == pytest.approx(math.log(8))


def test_kl_of_two_equal_codes_of_eight_is_ln_4_at_any_temperature() -> None:
    logits = torch.tensor([[50.0, 50.0, 0, 0, 0, 0, 0, 0]])
    for temperature in (1.0, 0.1):
        assert _relax(logits, temperature)[1].item() == pytest.approx(math.log(4))


def test_low_temperature_draws_codes_with_their_probability() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    n = 20_000
    draws = _relax(logits.expand(n, 4), 0.01)[0].argmax(-1)
    frequency = torch.bincount(draws, minlength=4) / n
    # Five standard deviations of a frequency near 1/2: chance of a false alarm below 1e-5, and the seed is fixed.
    torch.testing.assert_close(frequency, logits.softmax(0), atol=5 * 0.5 / n**0.5, rtol=0)


def test_relaxed_codes_are_a_distribution_that_sharpens_with_low_temperature() -> None:
    logits = torch.randn(50, 6, generator=generator())
    soft, sharp = _relax(logits, 1.0)[0], _relax(logits, 1 / 16)[0]
    torch.testing.assert_close(soft.sum(-1), torch.ones(50))
    assert (sharp.amax(-1) >= soft.amax(-1) - 1e-6).all()


def test_half_precision_is_relaxed_in_single() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors, kl = _relax(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert vectors.dtype == kl.dtype == torch.float32


def test_noise_of_half_precision_logits_has_the_distribution_of_gumbel() -> None:
    noise = gumbel_noise(torch.zeros(100_000, dtype=torch.bfloat16), generator())
    assert len(noise.unique()) > 90_000, "bfloat16 would have a few hundred values"
    # Mean of a Gumbel variable: Euler's constant; five standard errors of pi / sqrt(6) / sqrt(n).
    assert noise.mean().item() == pytest.approx(0.5772, abs=5 * 1.2825 / 100_000**0.5)


def test_temperature_0_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        _relax(torch.zeros(2, 3), 0.0)


def test_two_maps_over_the_codes_are_kept_for_the_backward_pass(inputs: list[Tensor]) -> None:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        relaxed_codes(*inputs, temperature=1.0, generator=generator())
    assert sizes.count(2 * 3 * 4 * 7) == 2, "positions times codes"


def test_nothing_is_kept_without_gradients(inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    apply = relaxation._RelaxedCodes.apply

    def spy(*arguments: Any) -> Any:
        kept.append(arguments[-1])
        return apply(*arguments)

    monkeypatch.setattr(relaxation._RelaxedCodes, "apply", spy)
    with torch.no_grad():
        relaxed_codes(*inputs, temperature=1.0, generator=generator())
    relaxed_codes(*(tensor.detach() for tensor in inputs), temperature=1.0, generator=generator())
    relaxed_codes(*inputs, temperature=1.0, generator=generator())
    assert kept == [False, False, True]


def test_most_likely_codes_are_the_argmax_of_the_logits(inputs: list[Tensor]) -> None:
    features, weight, bias, _ = inputs
    assert torch.equal(most_likely_codes(features, weight, bias), F.linear(features, weight, bias).argmax(-1))
