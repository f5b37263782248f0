"""The same stages on a CUDA device in mixed precision: `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1.models import relaxation
from dalle1.models.attention import build_attention
from dalle1.models.flex_attention import FlexAttention
from dalle1.models.linear_cross_entropy import linear_cross_entropy
from dalle1.pipeline import Pipeline, choose_device
from dalle1.rerank.own_clip import CLIPReranker

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed")


def test_all_stages_train_in_bf16_and_their_checkpoints_sample(train: Callable[..., Any], tmp_path: Path) -> None:
    train(tmp_path, "tokenizer")
    for stage in ("dvae", "clip", "transformer"):
        assert train(tmp_path, stage, *ON_GPU)["step"] == 8
    last = {stage: tmp_path / stage / "checkpoints" / "last.ckpt" for stage in ("transformer", "dvae", "clip")}
    reranker = CLIPReranker.load(last.pop("clip"))
    pipeline = Pipeline.from_checkpoint(**last, reranker=reranker).to(choose_device("cuda"))
    result = pipeline(["a red circle"], candidates=3)[0]
    assert result.images.isfinite().all()
    assert result.scores == sorted(result.scores or [], reverse=True)


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_transformer_trains_compiled_through_flex_attention(
    train: Callable[..., Any], tmp_path: Path, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("tokenizer", "dvae"):
        train(tmp_path, stage, "trainer.accelerator=gpu")
    built: list[type] = []
    monkeypatch.setattr(
        "dalle1.models.transformer.build_attention",
        lambda *arguments: built.append(type(attend := build_attention(*arguments))) or attend,
    )
    options = ("model.d_model=64", "compute.compile=true", f"compute.activation_checkpointing={recompute}")
    assert train(tmp_path, "transformer", *ON_GPU, *options, "compute.attention_backend=flex")["step"] == 8
    assert built == [FlexAttention] * 3, "every pattern hides something here"


def test_cross_entropy_of_16_bit_factors_is_near_that_of_the_cpu() -> None:
    draw = torch.Generator().manual_seed(0)
    states, weight, bias = (torch.randn(shape, generator=draw) / 4 for shape in ((50, 64), (100, 64), (100,)))
    targets, weights = torch.randint(100, (50,), generator=draw), torch.rand(50, generator=draw)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [each.to(device).requires_grad_() for each in (states, weight, bias)]
        with torch.autocast(device, torch.bfloat16):
            result = linear_cross_entropy(*leaves, targets.to(device), weights.to(device))
        results.append([result.nats, *torch.autograd.grad(result.loss, leaves)])
    for cpu, gpu in zip(*results, strict=True):
        # Of 64 products of factors with 8 bits.
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=2e-2, atol=2e-2)


def test_transformer_trains_with_scaled_fp16_resblocks(train: Callable[..., Any], tmp_path: Path) -> None:
    for stage in ("tokenizer", "dvae"):
        train(tmp_path, stage, "trainer.accelerator=gpu")
    options = ("trainer.accelerator=gpu", "optim.resblock_gradient_scaling=true")
    assert train(tmp_path, "transformer", *options)["step"] == 8


def test_relaxation_equals_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    # Devices draw different noise; without any, all else must agree.
    monkeypatch.setattr(relaxation, "gumbel_noise", lambda logits, generator: torch.zeros_like(logits))
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 5, 16), (32, 16), (32,), (32, 8))
    results = []
    for device in ("cpu", "cuda"):
        inputs = [torch.randn(shape, generator=draw.manual_seed(0), dtype=torch.float64) for shape in shapes]
        inputs = [tensor.to(device).requires_grad_() for tensor in inputs]
        vectors, kl = relaxation.relaxed_codes(*inputs, temperature=0.5)
        results.append([vectors, kl, *torch.autograd.grad(vectors.square().sum() + kl.sum(), inputs)])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-10, atol=1e-12)
