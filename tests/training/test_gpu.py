"""The same stages on a CUDA device in mixed precision: `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle1.models import relaxation
from dalle1.pipeline import Pipeline, choose_device

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
    pipeline = Pipeline.from_checkpoints(**last).to(choose_device("cuda"))
    result = pipeline(["a red circle"], candidates=3)[0]
    assert result.images.isfinite().all()
    assert result.scores == sorted(result.scores or [], reverse=True)


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
