"""Captions to tokens and back."""

from __future__ import annotations

import json

import pytest
import torch

from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig

CAPTIONS = ["a red circle above a blue square", "a blue circle on the left", "two red squares"] * 3


def _train(vocab_size: int = 280, seq_len: int = 12) -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, TextTokenizerConfig(vocab_size=vocab_size, seq_len=seq_len))


def test_training_twice_gives_the_same_tokenizer() -> None:
    first, second = _train(), _train()
    assert first.to_dict() == second.to_dict()
    assert first.sha256 == second.sha256


def test_hash_changes_with_the_length_and_the_merges() -> None:
    assert len({_train().sha256, _train(seq_len=13).sha256, _train(vocab_size=270).sha256}) == 3


def test_merges_shorten_the_captions_that_they_were_learned_from() -> None:
    tokenizer = _train()
    assert tokenizer.n_entries == 280
    assert len(tokenizer.ids(CAPTIONS[0])) < len(CAPTIONS[0]) / 2


def test_small_corpus_leaves_entries_unused() -> None:
    tokenizer = TextTokenizer.train(["ab"], TextTokenizerConfig(vocab_size=1000, seq_len=4))
    assert tokenizer.vocab_size == 1000
    assert 256 <= tokenizer.n_entries < 300
    assert tokenizer.encode(["b"])[0, 1:].tolist() == [1001, 1002, 1003]


@pytest.mark.parametrize(
    "text", ["a red circle", "z!?#,;'\"", "日本のドラゴン", "🐉🔥", "кот", "<pad>", "[unk] </s> <|endoftext|>", "a  b"]
)
def test_decode_inverts_encode(text: str) -> None:
    tokenizer = _train(seq_len=60)
    tokens = tokenizer.encode([text])
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens[0].tolist()) == text


def test_special_looking_text_is_plain_text() -> None:
    tokenizer = _train(seq_len=60)
    assert len(tokenizer.ids("<pad>")) > 1
    assert max(tokenizer.ids("<pad> </s>")) < tokenizer.vocab_size


def test_padding_is_the_vocabulary_size_plus_the_position() -> None:
    tokenizer = _train()
    tokens = tokenizer.encode(["red", "a red circle"])
    for row, caption in zip(tokens.tolist(), ("red", "a red circle"), strict=True):
        length = len(tokenizer.ids(caption))
        assert row[:length] == tokenizer.ids(caption)
        assert row[length:] == [280 + position for position in range(length, 12)]


def test_caption_that_fills_all_positions_has_no_padding() -> None:
    tokens = _train(seq_len=3).encode(["zzz"])
    assert tokens.shape == (1, 3)
    assert (tokens < 280).all()


def test_upper_case_and_outer_white_space_do_not_matter() -> None:
    tokenizer = _train()
    assert torch.equal(tokenizer.encode(["  A Red\tCIRCLE\n"]), tokenizer.encode(["a red\tcircle"]))


def test_composed_and_decomposed_letters_are_the_same() -> None:
    tokenizer = _train()
    assert tokenizer.ids("caf\u00e9") == tokenizer.ids("cafe\u0301")


@pytest.mark.parametrize("caption", ["", "  \n"])
def test_empty_caption_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="caption must not be empty"):
        _train().encode(["a", caption])


def test_caption_that_is_too_long_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="caption must have at most 12 tokens, got 13: 'zzzzzzzzzzzzz'"):
        _train().encode(["z" * 13])


def test_caption_that_is_too_long_can_be_cut() -> None:
    tokenizer = _train()
    assert torch.equal(tokenizer.encode(["z" * 13], truncate=True), tokenizer.encode(["z" * 12]))


def test_from_dict_inverts_to_dict_through_json() -> None:
    tokenizer = _train()
    record = tokenizer.to_dict()
    again = TextTokenizer.from_dict(json.loads(json.dumps(record)))
    assert again.sha256 == tokenizer.sha256
    assert torch.equal(again.encode(CAPTIONS[1:3]), tokenizer.encode(CAPTIONS[1:3]))


def test_from_dict_refuses_another_format_version() -> None:
    record = _train().to_dict() | {"format_version": 99}
    with pytest.raises(ValueError, match="must have format version 1, got 99"):
        TextTokenizer.from_dict(record)


def test_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be >= 256, .* got 255"):
        TextTokenizerConfig(vocab_size=255, seq_len=4)


def test_no_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len must be >= 1, got 0"):
        TextTokenizerConfig(vocab_size=256, seq_len=0)
