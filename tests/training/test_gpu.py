"""The same stages on a CUDA device in mixed precision: `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_runs import TrainScript, last

from dalle1.checkpoint import load_transformer
from dalle1.models import relaxation
from dalle1.models.attention import build_attention
from dalle1.models.decoding import Decoder, Decoding
from dalle1.models.flex_attention import FlexAttention
from dalle1.models.linear_cross_entropy import linear_cross_entropy
from dalle1.models.transformer import DalleTransformer
from dalle1.pipeline import Pipeline, choose_device
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.sampling.filters import SamplingConfig
from dalle1.sampling.sampler import Sampler, draw_codes

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


@torch.inference_mode()
def _decode(decoder: Decoder, texts: torch.Tensor, candidates: int, *, greedy: bool) -> tuple[torch.Tensor, ...]:
    """Tokens (r, n) and their logits (r, n, v) of two prompts, drawn from fixed random numbers."""
    states = [decoder.prefill(text[None]) for text in texts]
    decoding = Decoding(decoder, [(states[:1], candidates), (states[1:], candidates)])
    length = decoder.model.config.image_seq_len
    uniforms = torch.rand(2 * candidates, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, tokens = [decoding.logits], []
    for column in uniforms.to(texts.device).T.contiguous():
        tokens.append(logits[-1].argmax(-1) if greedy else draw_codes(logits[-1].double(), column))
        if len(tokens) < length:
            logits.append(decoding.step(tokens[-1]))
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def _texts(model: DalleTransformer) -> torch.Tensor:
    shape = (2, model.config.text_seq_len)
    return torch.randint(model.config.text_vocab_size, shape, generator=torch.Generator().manual_seed(3)).cuda()


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["paper", ("full", "conv", "column", "row")])
def test_cuda_graphs_have_the_tokens_of_eager_steps(
    make_transformer: Callable[..., DalleTransformer],
    attention: Any,
    dtype: torch.dtype,
    greedy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_transformer(attention=attention, d_model=64, grid_height=6, grid_width=5, start="two").cuda()
    decoder, batches = Decoder(model, dtype=dtype), (3, 3, 1)
    with_graph = []
    for candidates in batches:
        with_graph.append(_decode(decoder, _texts(model), candidates, greedy=greedy))
        assert decoder._kept is not None
        assert decoder._kept._graph is not None
    monkeypatch.setattr("dalle1.models.decoding.try_to_record", lambda *_: None)
    for candidates, (tokens, logits) in zip(batches, with_graph, strict=True):
        expected = _decode(Decoder(model, dtype=dtype), _texts(model), candidates, greedy=greedy)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-5, atol=1e-5)


def test_cuda_graphs_have_the_logits_of_other_steps_and_of_a_cpu(
    make_transformer: Callable[..., DalleTransformer],
) -> None:
    model = make_transformer(d_model=64, grid_height=6, grid_width=5, attention=("full", "conv", "column", "row"))
    texts = _texts(model)
    tokens, expected = _decode(Decoder(model), texts.cpu(), 3, greedy=True)
    model.cuda()
    for options, tolerance in (({}, 1e-3), ({"static": False}, 1e-3), ({"compiled": True}, 1e-3)):
        torch._dynamo.reset()
        decoded = _decode(Decoder(model, **options), texts, 3, greedy=True)
        assert torch.equal(decoded[0].cpu(), tokens)
        torch.testing.assert_close(decoded[1].cpu(), expected, rtol=tolerance, atol=tolerance)
    # 8 bits of every number.
    _, logits = _decode(Decoder(model, dtype=torch.bfloat16), texts, 3, greedy=True)
    first = logits[:, 0].cpu() - expected[:, 0]
    assert first.square().mean().sqrt() < 0.02 * expected[:, 0].std()


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_pictures_in_batches_are_those_without_cuda_graphs(
    make_transformer: Callable[..., DalleTransformer], guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_transformer(d_model=64).cuda()
    config, options = SamplingConfig(guidance_scale=guidance_scale), {"seeds": [list(range(7))] * 2, "batch_size": 3}
    tokens = Sampler(model, config).sample(_texts(model), **options)
    monkeypatch.setattr("dalle1.models.decoding.try_to_record", lambda *_: None)
    assert torch.equal(Sampler(model, config).sample(_texts(model), **options), tokens)


def test_candidates_that_share_a_beginning_go_on_in_cuda_graphs(
    make_transformer: Callable[..., DalleTransformer],
) -> None:
    model = make_transformer(d_model=64).cuda()
    with torch.inference_mode():
        decoder = Decoder(model)
        states = [decoder.prefill(text[None]) for text in _texts(model)]
        one, many = (Decoding(decoder, [(states, candidates)]) for candidates in (1, 3))
        for position in range(5):
            tokens = torch.tensor([position, position + 1], device="cuda")
            one.step(tokens)
            many.step(tokens.repeat_interleave(3))
        tokens = torch.arange(6, device="cuda")
        torch.testing.assert_close(one.spread(3).step(tokens), many.step(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("sending", ["plain", "bf16", "powersgd"])
def test_compiled_run_in_bf16_under_a_strategy_goes_on_after_a_signal(
    trained: Path, train_script: TrainScript, tmp_path: Path, strategy: str, sending: str
) -> None:
    if strategy == "fsdp" and sending != "plain":
        pytest.skip("other ways to send are for DDP")
    for stage in ("tokenizer", "dvae"):
        shutil.copytree(trained / stage, tmp_path / stage)
    options = (f"trainer={strategy}", *ON_GPU, "trainer.devices=1", "compute.compile=true", "model.d_model=64")
    options += (f"communication={sending}", "compute.activation_checkpointing=true")
    kill = ("+callbacks.kill._target_=killing.KillAt", "+callbacks.kill.step=5")
    assert "SIGTERM has stopped" in train_script(tmp_path, "transformer", *options, *kill)
    assert "from step 6" in train_script(tmp_path, "transformer", *options)
    summary = json.loads((tmp_path / "transformer" / "summary.json").read_text())
    assert summary["step"] == 8
    assert summary["loss"] < 10
    assert load_transformer(last(tmp_path, "transformer")).step == 8
