"""Captions as training sees them: cut or refused, in other pieces every time, the same again for the same seed."""

from __future__ import annotations

import pickle

import pytest
import torch
from tokenizers import Tokenizer, models

from dalle1.tokenizers.caption_encoder import CaptionEncoder
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig

CAPTIONS = ["a red circle above a blue square", "a blue circle on the left", "two red squares"] * 3
CAPTION = CAPTIONS[0]


def tokenizer_of(seq_len: int) -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, TextTokenizerConfig(vocab_size=290, seq_len=seq_len))


def encoder(seq_len: int = 40, *, truncate: bool = False, bpe_dropout: float = 0.5) -> CaptionEncoder:
    return CaptionEncoder(tokenizer_of(seq_len), truncate=truncate, bpe_dropout=bpe_dropout)


def test_without_dropout_or_a_draw_it_is_the_tokenizer() -> None:
    expected = tokenizer_of(40).encode([CAPTION])[0]
    for encode, draw in ((encoder(), None), (encoder(bpe_dropout=0.0), "0|0|0")):
        tokens, is_cut = encode(f" {CAPTION}\n", draw)
        assert torch.equal(tokens, expected)
        assert tokens.dtype == torch.int64
        assert not is_cut


def test_draw_is_a_function_of_its_seed_also_in_another_process() -> None:
    encode, tokenizer = encoder(), tokenizer_of(40)
    draws = [encode(CAPTION, f"0|{epoch}|7").tokens for epoch in range(20)]
    assert len({tuple(tokens.tolist()) for tokens in draws}) > 10
    assert {tokenizer.decode(tokens.tolist()) for tokens in draws} == {CAPTION}
    again = pickle.loads(pickle.dumps(encode))
    assert all(torch.equal(again(CAPTION, f"0|{epoch}|7").tokens, draws[epoch]) for epoch in range(20))


def test_draws_stay_what_they_are() -> None:
    # Else a run could not be continued with another version.
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    encode = CaptionEncoder(TextTokenizer(bpe, vocab_size=3, seq_len=8), truncate=False, bpe_dropout=0.5)
    draws = [encode("abababab", f"0|{epoch}|17").tokens.tolist() for epoch in range(3)]
    assert draws == [[0, 1, 2, 0, 1, 0, 1, 10], [2, 2, 2, 2, 7, 8, 9, 10], [2, 2, 0, 1, 0, 1, 9, 10]]


def test_caption_too_long_is_refused_or_cut_and_told() -> None:
    n = len(tokenizer_of(40).ids(CAPTION))
    for draw in (None, "0|0|0"):
        with pytest.raises(ValueError, match=rf"at most {n - 1} tokens, got {n}: '{CAPTION}'"):
            encoder(n - 1)(CAPTION, draw)
        tokens, is_cut = encoder(n - 1, truncate=True)(CAPTION, draw)
        assert is_cut
        assert tokens.shape == (n - 1,)
        assert int(tokens.max()) < 290, "no padding"


def test_draw_that_is_too_long_is_cut_but_not_told() -> None:
    n = len(tokenizer_of(40).ids(CAPTION))
    results = [encoder(n, truncate=True)(CAPTION, f"0|0|{i}") for i in range(20)]
    assert not any(is_cut for _, is_cut in results)
    assert {tokens.shape for tokens, _ in results} == {(n,)}
    texts = {tokenizer_of(n).decode(tokens.tolist()) for tokens, _ in results}
    assert len(texts) > 5
    assert all(CAPTION.startswith(text) for text in texts)


def test_draw_that_is_too_long_and_must_not_be_cut_has_no_dropout() -> None:
    n = len(tokenizer_of(40).ids(CAPTION))
    plain = tokenizer_of(n).encode([CAPTION])[0]
    assert all(torch.equal(encoder(n)(CAPTION, f"0|0|{i}").tokens, plain) for i in range(20))


@pytest.mark.parametrize("draw", [None, "0|0|0"])
def test_endless_caption_is_read_as_far_as_it_can_matter(draw: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = f"  {CAPTION} " * 30_000
    expected = encoder(seq_len=9, truncate=True)(endless[:900], draw).tokens
    read: list[int] = []
    ids = TextTokenizer.ids
    monkeypatch.setattr(TextTokenizer, "ids", lambda self, text: read.append(len(text)) or ids(self, text))
    tokens, is_cut = encoder(seq_len=9, truncate=True)(endless, draw)
    assert torch.equal(tokens, expected)
    assert is_cut
    assert read == [900]
    with pytest.raises(
        ValueError, match=r"at most 9 tokens, got one of 1,0\d\d,\d\d\d characters; truncate_captions=true"
    ):
        encoder(seq_len=9)(endless, draw)


@pytest.mark.parametrize("draw", [None, "0|0|0"])
def test_empty_caption_is_refused(draw: str | None) -> None:
    with pytest.raises(ValueError, match="caption must not be empty"):
        encoder()(" \n", draw)
