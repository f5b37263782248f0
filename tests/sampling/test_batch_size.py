"""How many sequences fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dalle1.models.decoding import Decoder, Decoding
from dalle1.models.transformer import DalleTransformer
from dalle1.sampling import batch_size
from dalle1.sampling.batch_size import auto_batch_size, bytes_per_row, free_memory

CPU = torch.device("cpu")


def test_row_counts_what_decoding_really_holds(make_transformer: Callable[..., DalleTransformer]) -> None:
    model = make_transformer()
    decoder = Decoder(model)
    text = torch.zeros(1, model.config.text_seq_len, dtype=torch.int64)
    decoding = Decoding(decoder, [([decoder.prefill(text), decoder.prefill(text)], 1)])
    held = sum(layer.image._keys.nbytes + layer.image._values.nbytes for layer in decoding._layers)
    texts = sum(text.keys.nbytes + text.values.nbytes for layer in decoding._layers for text in layer.texts)
    logits = 64 * model.config.image_vocab_size
    # For two rows: their image states, and texts that are there twice while they are put together.
    assert 2 * bytes_per_row(model.config, torch.float32) == held + 2 * texts + 2 * logits


@pytest.mark.parametrize(("guided", "rows"), [(False, 1), (True, 2)])
def test_half_of_the_free_memory_is_filled(
    make_transformer: Callable[..., DalleTransformer], monkeypatch: pytest.MonkeyPatch, guided: bool, rows: int
) -> None:
    config = make_transformer().config
    each = rows * bytes_per_row(config, torch.float32)
    for free, expected in ((2 * each * 9, 8), (2 * each * 8, 8), (2 * each * 8 - 1, 4), (0, 1), (10**12, 64)):
        monkeypatch.setattr(batch_size, "free_memory", lambda device, free=free: free)
        assert auto_batch_size(config, device=CPU, dtype=torch.float32, guided=guided) == expected


def test_free_memory_is_that_of_the_machine_or_of_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "_CONTROL_GROUP", tmp_path)
    machine = free_memory(CPU)
    assert 2**20 < machine < 2**50
    (tmp_path / "memory.current").write_text("300\n")
    for limit, expected in (("1000\n", 700), ("200\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert free_memory(CPU) == expected
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 2**20
