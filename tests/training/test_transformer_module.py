"""What a training step of the transformer learns from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle1.data.transforms import to_unit_interval
from dalle1.models.dvae import DVAE
from dalle1.models.transformer import DalleTransformer
from dalle1.tokenizers.image import ImageTokenizer
from dalle1.tokenizers.text import TextTokenizer
from dalle1.training.transformer_module import (
    DEFAULT_COMPUTE,
    ComputeConfig,
    TransformerModule,
    TransformerOptimConfig,
)


@pytest.fixture
def make_module(
    make_transformer: Callable[..., DalleTransformer],
    make_dvae: Callable[..., DVAE],
    text_tokenizer: TextTokenizer,
    optim_numbers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., TransformerModule]:
    """A module whose logged values are in `logged`; keywords go to its optimizer configuration."""

    def make(compute: ComputeConfig = DEFAULT_COMPUTE, **options: object) -> TransformerModule:
        transformer = make_transformer(
            text_vocab_size=text_tokenizer.vocab_size, text_seq_len=text_tokenizer.seq_len
        ).requires_grad_(True)
        module = TransformerModule(
            transformer,
            TransformerOptimConfig(**(optim_numbers | options)),
            seed=0,
            image_tokenizer=ImageTokenizer(make_dvae(), sha256="x"),
            text_tokenizer=text_tokenizer,
            compute=compute,
        )
        monkeypatch.setattr(module, "log_means", lambda split, values, size, **_: setattr(module, "logged", values))
        return module

    return make


def batch_of(module: TransformerModule, n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config, factor = module.model.config, module.image_tokenizer.dvae.config.downsampling
    size = (n, 3, config.grid_height * factor, config.grid_width * factor)
    pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    assert module.text_tokenizer is not None
    captions = ["a red circle", "a blue square on the left", "two green stars", "a red square"]
    text = module.text_tokenizer.encode([captions[i % 4] for i in range(n)])
    return {"pixels": pixels, "text_tokens": text, "index": torch.arange(n)}


def nats(module: TransformerModule, batch: dict[str, Tensor], dropped: Tensor | None) -> tuple[float, float]:
    tokens = module.image_tokenizer.encode(to_unit_interval(batch["pixels"])).flatten(1).clone()
    module._step("train", batch, tokens, dropped)
    return module.logged["text_nats_per_token"].item(), module.logged["image_nats_per_token"].item()


def test_dropped_captions_are_neither_input_nor_target(make_module: Callable[..., TransformerModule]) -> None:
    module = make_module()
    batch = batch_of(module, 4)
    text, image = nats(module, batch, None)
    all_dropped = torch.ones(4, 1, dtype=torch.bool)
    text_dropped, image_dropped = nats(module, batch, all_dropped)
    assert text > 0
    assert text_dropped == 0
    assert image_dropped != image
    # Another caption changes nothing then.
    other = batch | {"text_tokens": batch["text_tokens"].flip(0)}
    assert nats(module, other, all_dropped) == (text_dropped, image_dropped)
    assert nats(module, other, None) != (text, image)


def test_share_of_dropped_captions(
    make_module: Callable[..., TransformerModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(caption_dropout=0.25)
    seen: list[Tensor] = []
    monkeypatch.setattr(module, "_step", lambda split, batch, tokens, dropped: seen.append(dropped))
    monkeypatch.setattr(TransformerModule, "global_rank", 0)
    monkeypatch.setattr(TransformerModule, "global_step", 3)
    batch = batch_of(module, 400)
    module.training_step(batch, 0)
    module.training_step(batch, 0)
    assert torch.equal(seen[0], seen[1]), "the same step drops the same captions, also after a resume"
    module.on_after_backward()
    module.training_step(batch, 1)
    assert not torch.equal(seen[0], seen[2]), "the second part of an accumulated update drops others"
    # 100 expected with a standard deviation of 8.7: outside by chance once in 10^8.
    assert 50 < int(seen[0].sum()) < 150


def test_no_caption_is_dropped_by_default(
    make_module: Callable[..., TransformerModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module()
    monkeypatch.setattr(module, "_step", lambda split, batch, tokens, dropped: dropped)
    assert module.training_step(batch_of(module, 2), 0) is None


@pytest.mark.parametrize("name", ["caption_dropout", "bpe_dropout"])
@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_dropout_out_of_range_is_refused(optim_numbers: dict[str, Any], name: str, share: float) -> None:
    with pytest.raises(ValueError, match=rf"optim.{name} must be in \[0, 1\), got {share}"):
        TransformerOptimConfig(**(optim_numbers | {name: share}))


def test_scaled_resblocks_are_not_compiled(make_module: Callable[..., TransformerModule]) -> None:
    with pytest.raises(ValueError, match="true: every block has scales of its own"):
        make_module(resblock_gradient_scaling=True, compute=ComputeConfig(compile=True))


Step = Callable[[TransformerModule, dict[str, Tensor]], None]


@pytest.fixture
def make_update(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Gradients of one batch and what happens to them before the optimizer sees them."""
    monkeypatch.setattr(TransformerModule, "log", lambda *_: None)
    monkeypatch.setattr(TransformerModule, "global_step", 7)

    def update(module: TransformerModule, batch: dict[str, Tensor]) -> None:
        optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[index]
        optimizer.zero_grad()
        tokens = module.image_tokenizer.encode(to_unit_interval(batch["pixels"])).flatten(1).clone()
        module._step("train", batch, tokens).backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()

    return update


def test_scaled_resblocks_have_the_gradients_of_fp32(
    make_module: Callable[..., TransformerModule], make_update: Step
) -> None:
    plain = make_module(grad_clip_norm=0.0)
    scaled = make_module(grad_clip_norm=0.0, resblock_gradient_scaling=True)
    batch = batch_of(plain, 4)
    make_update(plain, batch)
    make_update(scaled, batch)
    expected = dict(plain.model.named_parameters())
    for name, weight in scaled.model.named_parameters():
        # fp16 rounds by 2^-11, in every layer again; the key's bias has no gradient but rounding.
        difference, size = (weight.grad - expected[name].grad).norm(), expected[name].grad.norm()
        assert difference < 0.01 * size, name


def test_overflow_in_one_resblock_changes_neither_weights_nor_the_other_scales(
    make_module: Callable[..., TransformerModule], make_update: Step
) -> None:
    module = make_module(resblock_gradient_scaling=True, weight_decay=0.1)
    assert module.scaling is not None
    assert len(module.scaling.scales) == 2 * len(module.model.blocks)
    module.scaling.scales[3] = 2.0**40
    weights = {name: weight.detach().clone() for name, weight in module.model.named_parameters()}
    make_update(module, batch_of(module, 4))
    assert all(torch.equal(weight, weights[name]) for name, weight in module.model.named_parameters())
    scales = module.scaling.scales.tolist()
    assert scales.pop(3) == 2.0**24
    assert set(scales) == {2.0**13}
    # Once the scale fits, updates are made again.
    module.scaling.scales[3] = 2.0**13
    make_update(module, batch_of(module, 4))
    assert not torch.equal(module.model.image_head.weight, weights["image_head.weight"])


def test_loss_that_is_not_finite_stops_a_scaled_run(
    make_module: Callable[..., TransformerModule], make_update: Step
) -> None:
    module = make_module(resblock_gradient_scaling=True)
    module.model.image_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="gradient must stay finite, got norm nan at step 7"):
        make_update(module, batch_of(module, 2))


def test_overflow_at_the_smallest_scale_stops_a_scaled_run(
    make_module: Callable[..., TransformerModule], make_update: Step
) -> None:
    module = make_module(resblock_gradient_scaling=True)
    module.model.image_head.weight.data.mul_(1e6)
    assert module.scaling is not None
    module.scaling.scales.fill_(2.0**7)
    with pytest.raises(ValueError, match="gradient must stay finite"):
        make_update(module, batch_of(module, 2))


def test_without_scaling_blocks_have_no_scales(make_module: Callable[..., TransformerModule]) -> None:
    module = make_module()
    assert module.scaling is None
    assert {block.attention_scale for block in module.model.blocks} == {None}
    assert not [name for name in module.state_dict() if "scal" in name]
