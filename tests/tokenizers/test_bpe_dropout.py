"""BPE dropout: the library's own result without it, single bytes with all of it, and the right chances between."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from random import Random
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from dalle1.models.options import Pretokenizer
from dalle1.tokenizers.bpe_dropout import BPEDropout, merge
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig

CAPTIONS = [
    "a red circle above a blue square",
    "two red squares on the left",
    "aaaaaa ababab 1234 été 日本 it's (red)",
] * 3
TOKENIZERS = {
    name: TextTokenizer.train(CAPTIONS, TextTokenizerConfig(vocab_size=330, seq_len=8, pretokenizer=name))
    for name in get_args(Pretokenizer)
}
# Words that the merges were learned from, and anything else.
texts = st.lists(st.one_of(st.sampled_from(" ".join(CAPTIONS).split()), st.text(max_size=8), st.just(" "))).map("".join)


def dropout_of(tokenizer: TextTokenizer) -> BPEDropout:
    return BPEDropout(tokenizer.bpe_json)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(text=texts.filter(str.strip))
@settings(deadline=None)
def test_without_dropout_it_is_the_library_and_with_all_of_it_single_bytes(tokenizer: TextTokenizer, text: str) -> None:
    text = text.strip()
    splitter = dropout_of(tokenizer)
    assert splitter.ids(text, 0.0, Random(0)) == tokenizer.ids(text)
    plain = tokenizer.decode(tokenizer.ids(text))
    single = splitter.ids(text, 1.0, Random(0))
    assert len(single) == len(plain.encode())
    assert tokenizer.decode(single) == plain


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(text=texts.filter(str.strip), percent=st.integers(0, 100), seed=st.integers())
@settings(deadline=None)
def test_every_draw_spells_the_same_text(tokenizer: TextTokenizer, text: str, percent: int, seed: int) -> None:
    text, dropout = text.strip(), percent / 100
    splitter = dropout_of(tokenizer)
    drawn = splitter.ids(text, dropout, Random(seed))
    assert tokenizer.decode(drawn) == tokenizer.decode(tokenizer.ids(text))
    assert drawn == splitter.ids(text, dropout, Random(seed))


@pytest.mark.parametrize(
    ("merges", "word", "chances"),
    [
        # a b is tried first; b c only if that is left out, and then a no longer joins.
        (
            {(1, 2): (0, 12), (2, 3): (1, 23), (12, 3): (2, 123)},
            [1, 2, 3],
            {(123,): 0.49, (12, 3): 0.21, (1, 23): 0.21, (1, 2, 3): 0.09},
        ),
        # a b left out for c d gets another chance after it.
        (
            {(1, 2): (0, 12), (3, 4): (1, 34)},
            [1, 2, 3, 4],
            {(12, 34): 0.7 * 0.7 * 1.3, (12, 3, 4): 0.21, (1, 2, 34): 0.3 * 0.7 * 0.3, (1, 2, 3, 4): 0.09},
        ),
    ],
)
def test_chances_are_those_of_the_definition(
    merges: dict[tuple[int, int], tuple[int, int]], word: list[int], chances: dict[tuple[int, ...], float]
) -> None:
    n, rng = 4000, Random(0)
    seen = Counter(tuple(merge(word, merges, 0.3, rng)) for _ in range(n))
    assert seen.keys() == chances.keys()
    for outcome, chance in chances.items():
        # Five standard deviations.
        assert abs(seen[outcome] / n - chance) < 5 * (chance * (1 - chance) / n) ** 0.5


def test_more_dropout_gives_more_tokens() -> None:
    tokenizer = TOKENIZERS["paper"]
    splitter, rng = dropout_of(tokenizer), Random(0)
    means = [sum(len(splitter.ids(CAPTIONS[0], p, rng)) for _ in range(50)) for p in (0.0, 0.1, 0.5, 0.9)]
    assert means == sorted(set(means))


def test_limit_ends_after_the_word_that_reaches_it() -> None:
    splitter = dropout_of(TOKENIZERS["paper"])
    whole = splitter.ids("red circle " * 100, 0.5, Random(3))
    start = splitter.ids("red circle " * 100, 0.5, Random(3), limit=7)
    assert 7 <= len(start) < 7 + len("circle")
    assert start == whole[: len(start)]


@pytest.mark.parametrize("text", ["a" * 100_000, "ab" * 50_000, "日" * 30_000])
def test_very_long_words_take_no_quadratic_time(text: str) -> None:
    # Ten billion steps would not end within any patience.
    assert len(dropout_of(TOKENIZERS["paper"]).ids(text, 0.1, Random(0))) < len(text.encode())


def _trained(**options: Any) -> Tokenizer:
    bpe = Tokenizer(models.BPE(unk_token="?", fuse_unk=options.pop("fuse_unk", False)))
    bpe.normalizer = normalizers.NFD()
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False, special_tokens=["?", "<pad>"], **options)
    bpe.train_from_iterator(CAPTIONS, trainer)
    bpe.encode_special_tokens = True
    return bpe


def _spelled() -> Tokenizer:
    """As from sentencepiece: characters without an entry are spelled as bytes, some of which are missing."""
    vocab = {
        token: i
        for i, token in enumerate(["?", *(f"<0x{byte:02X}>" for byte in range(250)), "a", "b", "ab", "▁", "▁a"])
    }
    merges = [("a", "b"), ("▁", "a"), ("<0xC3>", "<0xA9>")]
    vocab["<0xC3><0xA9>"] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="?", fuse_unk=True, byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    return bpe


OTHERS = {
    "unknown": _trained(),
    "unknown joined": _trained(fuse_unk=True),
    "suffix": _trained(end_of_word_suffix="</w>"),
    "prefix": _trained(continuing_subword_prefix="##"),
    "bytes": _spelled(),
}


@pytest.mark.parametrize("bpe", OTHERS.values(), ids=OTHERS.keys())
@given(text=texts)
@settings(deadline=None)
def test_without_dropout_bpes_of_others_are_the_library_too(bpe: Tokenizer, text: str) -> None:
    expected = bpe.encode(text, add_special_tokens=False).ids
    assert BPEDropout(bpe.to_str()).ids(text, 0.0, Random(0)) == expected


def test_bpe_that_looks_words_up_is_refused() -> None:
    content = json.loads(TOKENIZERS["paper"].bpe_json)
    content["model"]["ignore_merges"] = True
    with pytest.raises(ValueError, match=r"got one with ignore_merges; set optim\.bpe_dropout=0"):
        BPEDropout(json.dumps(content))


def test_special_tokens_are_text_also_after_pickling() -> None:
    splitter = BPEDropout(OTHERS["unknown"].to_str())
    for each in (splitter, pickle.loads(pickle.dumps(splitter))):
        assert len(each.ids("<pad>", 0.0, Random(0))) > 1
