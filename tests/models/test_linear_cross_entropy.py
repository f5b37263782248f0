"""Logits and cross-entropy in one give what they give apart, whatever the chunks and the precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle1.models import linear_cross_entropy as module
from dalle1.models.linear_cross_entropy import linear_cross_entropy


def example(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {
        "states": torch.randn(7, 5, generator=generator),
        "weight": torch.randn(11, 5, generator=generator),
        "bias": torch.randn(11, generator=generator),
    }
    leaves = {name: value.to(dtype).requires_grad_(True) for name, value in values.items()}
    weights = torch.rand(7, generator=generator).to(dtype)
    return leaves | {"targets": torch.randint(11, (7,), generator=generator), "weights": weights}


def test_nats_of_a_uniform_prediction_are_ln_v() -> None:
    values = example()
    result = linear_cross_entropy(
        **(values | {"weight": torch.zeros(16, 5).double(), "bias": torch.zeros(16).double()})
    )
    torch.testing.assert_close(result.nats, torch.full((7,), 16.0).double().log())


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 11 * 3, 1 << 20])
def test_loss_and_gradients_equal_those_of_logits(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", {"cpu": chunk_bytes})
    values = example()
    result = linear_cross_entropy(**values)
    logits = F.linear(values["states"], values["weight"], values["bias"])
    nats = F.cross_entropy(logits, values["targets"], reduction="none")
    torch.testing.assert_close(result.nats, nats)
    torch.testing.assert_close(result.loss, (nats * values["weights"]).sum())
    assert torch.equal(result.correct, logits.argmax(1) == values["targets"])
    leaves = [values[name] for name in ("states", "weight", "bias")]
    wanted = torch.autograd.grad(3 * (nats * values["weights"]).sum(), leaves)
    for got, expected in zip(torch.autograd.grad(3 * result.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_of_equal_logits_only_one_class_is_the_likeliest() -> None:
    values = example()
    values |= {"weight": torch.zeros(11, 5).double(), "bias": torch.zeros(11).double(), "targets": torch.arange(7)}
    assert linear_cross_entropy(**values).correct.tolist() == [True] + 6 * [False]


def test_only_the_loss_has_a_gradient() -> None:
    result = linear_cross_entropy(**example())
    assert result.loss.requires_grad
    assert not result.nats.requires_grad
    assert not result.correct.requires_grad


def test_nothing_is_differentiated_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_add_matmul", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert not linear_cross_entropy(**example()).loss.requires_grad


def test_logits_are_fp32_under_mixed_precision() -> None:
    values = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_cross_entropy(**values)
    assert mixed.nats.dtype == torch.float32
    torch.testing.assert_close(mixed.nats, linear_cross_entropy(**values).nats)


def test_factors_of_16_bits_give_logits_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    # What CUDA does in one product: factors rounded, sums and result not.
    def mm(a: Tensor, b: Tensor, *, out_dtype: Any) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(torch, "mm", mm)
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    got = module._matmul(a, b, torch.bfloat16)
    assert got.dtype == torch.float32
    assert torch.equal(got, a.bfloat16().float() @ b.bfloat16().float())
    total = torch.ones(3, 2)
    module._add_matmul(total, a, b, torch.bfloat16)
    torch.testing.assert_close(total, 1 + got)


def test_states_of_16_bits_get_gradients_of_16() -> None:
    values = example(torch.float32)
    states = values["states"].detach().bfloat16().requires_grad_(True)
    linear_cross_entropy(**(values | {"states": states})).loss.backward()
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16
