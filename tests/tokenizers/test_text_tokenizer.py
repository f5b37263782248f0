"""Captions to tokens and back."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch

from dalle1.models.options import Pretokenizer
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig

CAPTIONS = ["a red circle above a blue square", "a blue circle on the left", "two red squares"] * 3


def _train(vocab_size: int = 280, seq_len: int = 12, pretokenizer: Pretokenizer = "gpt2") -> TextTokenizer:
    config = TextTokenizerConfig(vocab_size=vocab_size, seq_len=seq_len, pretokenizer=pretokenizer)
    return TextTokenizer.train(CAPTIONS, config)


def pieces(tokenizer: TextTokenizer, text: str) -> list[str]:
    """What each token of a text stands for."""
    return [tokenizer.decode([number]) for number in tokenizer.ids(text)]


def test_training_twice_gives_the_same_tokenizer() -> None:
    first, second = _train(), _train()
    assert first.to_dict() == second.to_dict()
    assert first.sha256 == second.sha256


def test_captions_are_read_once_and_not_kept() -> None:
    class Caption(str):
        pass

    alive: weakref.WeakSet[Caption] = weakref.WeakSet()
    most = 0

    def captions() -> Iterator[str]:
        nonlocal most
        for i in range(3000):
            caption = Caption(f"number {i % 7}")
            alive.add(caption)
            most = max(most, len(alive))
            yield caption

    TextTokenizer.train(captions(), TextTokenizerConfig(vocab_size=260, seq_len=4))
    gc.collect()
    assert most < 1000, "the library takes them in portions of 256"


def test_defaults_are_the_papers() -> None:
    assert TextTokenizerConfig() == TextTokenizerConfig(vocab_size=16_384, seq_len=256, pretokenizer="paper")


def test_paper_merges_only_runs_of_letters() -> None:
    corpus = ["it's 1234 été 日本 red-red aa"] * 3
    tokenizer = TextTokenizer.train(corpus, TextTokenizerConfig(vocab_size=400, seq_len=40))
    assert pieces(tokenizer, "It's 1234 red-redd") == [
        *("it", "'", "s", " "),
        *("1", "2", "3", "4", " "),
        *("red", "-", "red", "d"),
    ]
    # Bytes of one character merge, but not with its neighbours; a letter beyond a-z ends a run.
    assert pieces(tokenizer, "日本 été") == ["日", "本", " ", "é", "t", "é"]


def test_gpt2_merges_a_word_with_the_space_before_it() -> None:
    tokenizer = TextTokenizer.train(
        ["it's 1234 red"] * 3, TextTokenizerConfig(vocab_size=400, seq_len=40, pretokenizer="gpt2")
    )
    assert pieces(tokenizer, "It's 1234 red") == ["it", "'s", " 1234", " red"]


@pytest.mark.parametrize("pretokenizer", ["paper", "gpt2"])
def test_pretokenizer_is_known_from_the_bpe_alone(pretokenizer: Pretokenizer) -> None:
    record = _train(pretokenizer=pretokenizer).to_dict()
    assert record["config"] == {"vocab_size": 280, "seq_len": 12}
    assert TextTokenizer.from_dict(record).pretokenizer == pretokenizer


def test_pickled_tokenizer_is_the_same() -> None:
    assert pickle.loads(pickle.dumps(_train())).to_dict() == _train().to_dict()


def test_hash_changes_with_the_length_and_the_merges() -> None:
    others = [_train(seq_len=13), _train(vocab_size=270), _train(pretokenizer="paper")]
    assert len({tokenizer.sha256 for tokenizer in (_train(), *others)}) == 4


def test_merges_shorten_the_captions_that_they_were_learned_from() -> None:
    tokenizer = _train()
    assert tokenizer.n_entries == 280
    assert len(tokenizer.ids(CAPTIONS[0])) < len(CAPTIONS[0]) / 2


def test_small_corpus_leaves_entries_unused() -> None:
    tokenizer = TextTokenizer.train(["ab"], TextTokenizerConfig(vocab_size=1000, seq_len=4))
    assert tokenizer.vocab_size == 1000
    assert 256 <= tokenizer.n_entries < 300
    assert tokenizer.encode(["b"])[0, 1:].tolist() == [1001, 1002, 1003]


@pytest.mark.parametrize("pretokenizer", ["paper", "gpt2"])
@pytest.mark.parametrize(
    "text",
    ["a red circle", "z!?#,;'\"", "日本のドラゴン", "🐉🔥", "кот", "<pad>", "[unk] </s> <|endoftext|>", "a  b\t\r\nc"],
)
def test_decode_inverts_encode(text: str, pretokenizer: Pretokenizer) -> None:
    tokenizer = _train(seq_len=60, pretokenizer=pretokenizer)
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


def test_unknown_pretokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="pretokenizer must be one of paper, gpt2, got 'words'"):
        TextTokenizerConfig(pretokenizer="words")  # type: ignore[arg-type]


def test_no_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len must be >= 1, got 0"):
        TextTokenizerConfig(vocab_size=256, seq_len=0)
