"""What training costs: counts against closed forms, and against what autograd keeps."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle1.models.accounting import (
    count_activations,
    count_flops,
    count_head_scratch,
    count_weights,
)
from dalle1.models.options import AttentionBackend
from dalle1.models.transformer import DalleTransformer, TransformerConfig

SQUARE = TransformerConfig(
    text_vocab_size=300,
    image_vocab_size=64,
    text_seq_len=40,
    grid_height=8,
    grid_width=8,
    n_layers=4,
    n_heads=2,
    d_model=128,
)
# A short text, before which `local` puts zeros; blocks that do not fill up; one layer that hides nothing.
ODD = TransformerConfig(
    text_vocab_size=50,
    image_vocab_size=96,
    text_seq_len=5,
    grid_height=6,
    grid_width=9,
    n_layers=4,
    n_heads=3,
    d_model=96,
    mlp_ratio=2,
    attention=("conv", "column", "full", "row"),
    start="two",
    activation="gelu",
)


class _Storages(TorchDispatchMode):
    """Bytes of what operations made and what still lives, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = tree_leaves((args, kwargs))
        given = {each.untyped_storage()._cdata for each in arguments if isinstance(each, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            storage = each.untyped_storage() if isinstance(each, torch.Tensor) else None
            if storage is not None and storage._cdata not in given | self.alive.keys():
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        return result


def _kept_bytes(config: TransformerConfig, batch: int, backend: AttentionBackend, mixed: bool, recompute: bool) -> int:
    """What lives after a forward pass because of it."""
    model = DalleTransformer(config).train()
    model.attention_backend = backend
    model.execute_blocks(recompute=recompute)
    text = torch.randint(config.text_vocab_size, (batch, config.text_seq_len))
    image = torch.randint(config.image_vocab_size, (batch, config.image_seq_len))
    weights = {"text_weights": torch.ones(text.shape), "image_weights": torch.ones(image.shape)}
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):  # as Lightning sets it
        with torch.no_grad():
            model.losses(text, image, **weights)  # makes the masks, which all updates share
        with _Storages() as storages:
            loss = model.losses(text, image, **weights).loss
    kept = sum(storages.alive.values())
    loss.backward()
    return kept


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["local", "dense"])
@pytest.mark.parametrize(("config", "batch"), [(SQUARE, 2), (ODD, 3)], ids=["square", "odd"])
def test_activations_are_what_the_forward_pass_leaves(
    config: TransformerConfig, batch: int, backend: AttentionBackend, mixed: bool, recompute: bool
) -> None:
    counted = count_activations(config, batch, backend=backend, mixed=mixed, recompute=recompute)
    # What a backward pass makes again is not there yet; the gradient of the heads' weights, in fp32, is.
    again = 2 * (4 + 2 * config.mlp_ratio) * config.d_model**2 if mixed and recompute else 0
    expected = counted.total - counted.recomputed - again
    expected += 4 * (config.text_classes + config.image_vocab_size) * (config.d_model + 1)

    assert _kept_bytes(config, batch, backend, mixed, recompute) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("backend", ["local", "dense", "flex"])
def test_recomputed_layer_needs_what_it_would_have_kept(backend: AttentionBackend) -> None:
    layers = [replace(SQUARE, n_layers=1, attention=(pattern,)) for pattern in ("row", "column", "conv")]
    kept = [count_activations(each, 2, backend=backend, mixed=True, recompute=False) for each in layers]
    whole = count_activations(SQUARE, 2, backend=backend, mixed=True, recompute=True)
    state = 4 * 2 * 104 * 128
    assert (whole.blocks, whole.recomputed) == (4 * state, max(each.blocks for each in kept) - state)
    assert whole.weight_copies == kept[0].weight_copies == 2 * 12 * 128**2


def test_flex_keeps_queries_keys_values_and_outputs() -> None:
    # Per state: two norms in fp32; queries, keys, values, the inputs of four matrices and of the activation function.
    row = 2 * (4 * 128 + 8) + 2 * 128 * (3 + 1 + 1 + 1 + 4 + 4) + 4 * 2
    for pattern, per_state in (("row", row), ("column", row + 2 * 128), ("full", row)):
        config = replace(SQUARE, n_layers=1, attention=(pattern,))
        counted = count_activations(config, 3, backend="flex", mixed=True, recompute=False)
        assert counted.blocks == 3 * 104 * per_state


def test_dropout_keeps_a_byte_for_each_number_that_a_branch_adds() -> None:
    counts = [
        count_activations(replace(SQUARE, dropout=dropout), 1, backend="flex", mixed=True, recompute=False).blocks
        for dropout in (0.0, 0.1)
    ]
    assert counts[1] - counts[0] == 4 * 2 * 104 * 128


def test_heads_work_on_as_many_logits_as_a_chunk_has() -> None:
    assert count_head_scratch(SQUARE, 2, "cuda") == 12 * 2 * 40 * 340
    assert count_head_scratch(TransformerConfig(), 1000, "cuda") == pytest.approx(3 * 256 * 2**20, rel=1e-3)
    assert count_head_scratch(TransformerConfig(), 1000, "cpu") == pytest.approx(3 * 16 * 2**20, rel=1e-2)


@pytest.mark.parametrize("config", [SQUARE, ODD], ids=["square", "odd"])
def test_weights_by_their_place_are_all_weights(config: TransformerConfig) -> None:
    with torch.device("meta"):
        model = DalleTransformer(config)
    weights = count_weights(model)
    assert weights.blocks == sum(weight.numel() for weight in model.blocks.parameters())
    classes = config.text_classes + config.image_vocab_size
    assert weights.heads == (config.d_model + 1) * classes + 2 * config.d_model
    assert weights.total == sum(weight.numel() for weight in model.parameters())


def test_operations_are_two_for_each_multiply_add_that_the_masks_allow() -> None:
    config = replace(SQUARE, text_seq_len=3, grid_height=2, grid_width=3, n_layers=1, attention=("row",))
    flops = count_flops(config)
    # 4 text states see themselves and what is before; 5 image states see the text and up to 4 of the image.
    pairs = (1 + 2 + 3 + 4) + 5 * 4 + (1 + 2 + 3 + 4 + 4)
    assert flops.linear == 2 * 9 * 12 * 128**2
    assert flops.attention == 2 * 2 * pairs * 128
    assert flops.heads == 2 * 128 * (3 * 303 + 6 * 64)
