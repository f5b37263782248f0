"""Captions to tokens: byte-level BPE on lower-cased text, with a padding token of its own for every position.

Nothing that a caption contains is ever anything but text: what is trained here has no special tokens, and those of a
BPE from elsewhere (see `text_file`) are not looked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dalle1.models.options import Pretokenizer, check_field_types

_FORMAT_VERSION = 1
_N_BYTES = 256  # the smallest vocabulary: byte-level BPE can spell any text with the bytes alone


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTokenizerConfig:
    """What is trained. The defaults are the paper's (Ramesh et al. 2021, sec. 2.2)."""

    vocab_size: int = 16_384  # entries that models reserve, >= 256
    seq_len: int = 256  # tokens per caption after padding
    # What merges stay within. `paper`: runs of a-z; every other character, the space too, stands alone, as the paper's
    # first author describes it (github.com/openai/DALL-E/issues/22). `gpt2`: words with the space before them, numbers,
    # runs of punctuation; about half the tokens.
    pretokenizer: Pretokenizer = "paper"

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.vocab_size < _N_BYTES:
            raise ValueError(f"text vocab_size must be >= {_N_BYTES}, one entry per byte, got {self.vocab_size}")
        if self.seq_len < 1:
            raise ValueError(f"text seq_len must be >= 1, got {self.seq_len}")


class TextTokenizer:
    """BPE with a fixed output length.

    Ids are in [0, vocab_size); position p of a shorter caption is filled with vocab_size + p, because the
    transformer learns one padding vector per position (Ramesh et al. 2021, sec. 2.2).
    """

    def __init__(self, bpe: Tokenizer, *, vocab_size: int, seq_len: int) -> None:
        """Wrap a trained BPE of the `tokenizers` library.

        Raises: ValueError if it has more ids than `vocab_size`, the number of entries that models reserve.
        """
        n_ids = 1 + max(bpe.get_vocab().values(), default=-1)
        if n_ids > vocab_size:
            raise ValueError(f"text_vocab_size must be >= {n_ids}, the ids of the BPE, got {vocab_size}")
        # Not part of what the library saves. Without it special tokens of adopted files would be found in captions.
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self.vocab_size = vocab_size
        self.seq_len = seq_len

    @classmethod
    def train(cls, captions: Iterable[str], config: TextTokenizerConfig) -> TextTokenizer:
        """Learn merges from captions; the same captions always give the same tokenizer.

        Captions are read once and not kept: memory grows with the number of different words. A small corpus gives
        fewer entries than `config.vocab_size`; the rest stays unused.
        """
        bpe = _untrained(config.pretokenizer)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, vocab_size=config.vocab_size, seq_len=config.seq_len)

    @property
    def n_entries(self) -> int:
        """Entries that training really made, <= vocab_size."""
        return int(self._bpe.get_vocab_size())

    @property
    def pretokenizer(self) -> Pretokenizer | None:
        """What merges stay within; None in a file of others that does it in another way."""
        rules = {_word_rules(_untrained(name)): name for name in get_args(Pretokenizer)}
        return rules.get(_word_rules(self._bpe))

    def ids(self, caption: str) -> list[int]:
        """The BPE ids of one caption without the white space around it, neither padded nor cut.

        Raises: ValueError if there are none.
        """
        text = caption.strip()
        if not text:
            raise ValueError("caption must not be empty")
        ids = list(self._bpe.encode(text, add_special_tokens=False).ids)
        if not ids:  # only in adopted files, whose BPE may not know all characters
            raise ValueError(f"caption must have at least one character that the tokenizer knows, got {text[:60]!r}")
        return ids

    def check_length(self, ids: Sequence[int], caption: str) -> None:
        """Raise ValueError unless the ids of a caption fit into `seq_len` tokens."""
        if len(ids) > self.seq_len:
            text = _shorten(caption.strip())
            raise ValueError(f"caption must have at most {self.seq_len} tokens, got {len(ids)}: {text!r}")

    def pad(self, ids: Sequence[int]) -> Int[Tensor, " t"]:
        """The first `seq_len` of the ids, and after fewer the padding of each position."""
        kept = list(ids[: self.seq_len])
        # One tensor of a list: twice as fast as several, and this is done for every caption of every batch.
        return torch.tensor([*kept, *range(self.vocab_size + len(kept), self.vocab_size + self.seq_len)])

    def encode(self, captions: Sequence[str]) -> Int[Tensor, "n t"]:
        """Tokens of captions, at least one, int64 (n, seq_len), padded at the end.

        Raises: ValueError if a caption is empty or too long.
        """
        rows = []
        for caption in captions:
            ids = self.ids(caption)
            self.check_length(ids, caption)
            rows.append(self.pad(ids))
        return torch.stack(rows)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; padding is left out."""
        return str(self._bpe.decode([token for token in tokens if token < self.vocab_size]))

    @property
    def bpe_json(self) -> str:
        """The BPE as the `tokenizers` library saves it."""
        return str(self._bpe.to_str())

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, in plain types; travels inside checkpoints."""
        return {
            "format_version": _FORMAT_VERSION,
            "config": {"vocab_size": self.vocab_size, "seq_len": self.seq_len},
            "bpe": self.bpe_json,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TextTokenizer:
        """Rebuild what `to_dict` gave.

        Raises: ValueError if the record has another format version.
        """
        if record.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"text tokenizer must have format version {_FORMAT_VERSION}, got {record.get('format_version')!r}"
            )
        return cls(Tokenizer.from_str(record["bpe"]), **record["config"])

    def __reduce__(self) -> tuple[Any, ...]:
        # What the library pickles would find special tokens again.
        return TextTokenizer.from_dict, (self.to_dict(),)

    @property
    def sha256(self) -> str:
        """Hash of all that decides the tokens of a caption."""
        content = f"{self.vocab_size}|{self.seq_len}|{self.bpe_json}"
        return hashlib.sha256(content.encode()).hexdigest()


def _untrained(pretokenizer: Pretokenizer) -> Tokenizer:
    """Byte-level BPE with no merges yet, which decodes to the text exactly, but for its case and composition."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    if pretokenizer == "gpt2":
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        letters = pre_tokenizers.Split(Regex("[a-z]+|[^a-z]"), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([letters, in_bytes])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _word_rules(bpe: Tokenizer) -> str:
    content = json.loads(bpe.to_str())
    return json.dumps([content["normalizer"], content["pre_tokenizer"]])


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
