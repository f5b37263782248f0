"""Text tokenizers from files: ours, and those of the `tokenizers` library."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dalle1.atomic_files import write_json
from dalle1.tokenizers.text import TextTokenizer, TextTokenizerConfig
from dalle1.tokenizers.text_file import load_text_tokenizer

CAPTIONS = ["a red circle above a blue square", "two red squares"] * 3
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a BPE of the library with special tokens and everything else that a caption must not get."""

    def write(special_tokens: tuple[str, ...] = ("<pad>", "<eos>"), **model: Any) -> Path:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=290, initial_alphabet=alphabet, show_progress=False, special_tokens=list(special_tokens)
        )
        bpe.train_from_iterator(CAPTIONS, trainer)
        bpe.add_tokens(["Zebra"])
        bpe.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
        bpe.enable_truncation(3)
        bpe.enable_padding(length=50, pad_token="<pad>")
        content = json.loads(bpe.to_str())
        content["model"] |= {"dropout": 0.9} | model
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(content))
        return path

    return write


def load(path: Path, vocab_size: int = 300, seq_len: int = 40) -> TextTokenizer:
    return load_text_tokenizer(path, vocab_size=vocab_size, seq_len=seq_len)


def test_own_file_brings_its_sizes(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train(CAPTIONS, TextTokenizerConfig(vocab_size=280, seq_len=12))
    write_json(tmp_path / "tokenizer.json", tokenizer.to_dict())
    assert load(tmp_path / "tokenizer.json").to_dict() == tokenizer.to_dict()


def test_file_of_the_library_only_splits_text(write: Write) -> None:
    path = write()
    library = Tokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    library.model.dropout = None  # type: ignore[attr-defined]
    tokenizer = load(path)
    assert (tokenizer.vocab_size, tokenizer.seq_len, tokenizer.pretokenizer) == (300, 40, None)
    caption = "A red circle Zebra above"
    assert tokenizer.ids(caption) == library.encode(caption, add_special_tokens=False).ids
    assert library.token_to_id("Zebra") in tokenizer.ids(caption), "an added token that is not special"
    assert tokenizer.encode([caption])[0, -1] == 300 + 39


def test_special_tokens_of_the_file_are_plain_text_also_after_saving_and_pickling(write: Write) -> None:
    tokenizer = load(write())
    for each in (tokenizer, TextTokenizer.from_dict(tokenizer.to_dict()), pickle.loads(pickle.dumps(tokenizer))):
        ids = each.ids("red <pad> <eos>")
        assert not {0, 1} & set(ids)
        assert each.decode(ids).strip() == "red <pad> <eos>"


def test_text_that_would_be_a_special_token_after_all_is_refused(write: Write) -> None:
    path = write(special_tokens=("Ġpad", "<eos>"), ignore_merges=True)
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json' does not fit: special .* the text 'Ġpad' is read as one"):
        load(path)


def test_more_entries_than_the_model_reserves_are_refused(write: Write) -> None:
    path = write()
    n = Tokenizer.from_file(str(path)).get_vocab_size()
    assert load(path, vocab_size=n).n_entries == n
    with pytest.raises(ValueError, match=rf"does not fit: text_vocab_size must be >= {n}, .*, got {n - 1}"):
        load(path, vocab_size=n - 1)


def test_caption_of_unknown_characters_alone_is_refused(write: Write) -> None:
    path = write()
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="at least one character that the tokenizer knows, got '日本'"):
        load(path).encode(["日本"])


def test_missing_file_names_the_stage_to_run_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"run 'python train.py stage=tokenizer' first, with this name= and .*, or give text_tokenizer",
    ):
        load(tmp_path / "tokenizer.json")


WORDS = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is not a text tokenizer of stage=tokenizer or of the tokenizers library \(Expecting value"),
        ("3", r"is not a text tokenizer of"),
        ("[]", r"is not a text tokenizer of"),
        ("{}", r"is not a text tokenizer of .*\(Model missing"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', r"is not a text tokenizer of .*`b`"),
        ('{"format_version": 99}', r"is not a text tokenizer of .*must have format version 1, got 99"),
        (WORDS, r"does not fit: a text tokenizer must be a BPE, got WordLevel; give another text_tokenizer=PATH"),
    ],
)
def test_other_file_is_refused_in_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)
