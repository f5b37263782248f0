"""Captions to tokens: byte-level BPE on lower-cased text, with a padding token of its own for every position.

The vocabulary has no special tokens, so nothing that a caption contains is ever anything but text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from dalle1.models.options import check_field_types

_FORMAT_VERSION = 1
_N_BYTES = 256  # the smallest vocabulary: byte-level BPE can spell any text with the bytes alone


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTokenizerConfig:
    """Size of a text tokenizer. The paper's has 16,384 entries and 256 tokens per caption (sec. 2.2)."""

    vocab_size: int  # entries that models reserve, >= 256
    seq_len: int  # tokens per caption after padding

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.vocab_size < _N_BYTES:
            raise ValueError(f"text vocab_size must be >= {_N_BYTES}, one entry per byte, got {self.vocab_size}")
        if self.seq_len < 1:
            raise ValueError(f"text seq_len must be >= 1, got {self.seq_len}")


class TextTokenizer:
    """Byte-level BPE with a fixed output length.

    Ids are in [0, vocab_size); position p of a shorter caption is filled with vocab_size + p, because the
    transformer learns one padding vector per position (Ramesh et al. 2021, sec. 2.2).
    """

    def __init__(self, bpe: Tokenizer, config: TextTokenizerConfig) -> None:
        """Wrap a trained BPE of the `tokenizers` library.

        Raises: ValueError if it has more entries than `config` reserves.
        """
        if bpe.get_vocab_size() > config.vocab_size:
            raise ValueError(
                f"vocab_size must be >= the {bpe.get_vocab_size()} entries of the BPE, got {config.vocab_size}"
            )
        self._bpe = bpe
        self.config = config

    @classmethod
    def train(cls, captions: Iterable[str], config: TextTokenizerConfig) -> TextTokenizer:
        """Learn merges from captions; the same captions always give the same tokenizer.

        A small corpus gives fewer entries than `config.vocab_size`; the rest stays unused.
        """
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, config)

    @property
    def vocab_size(self) -> int:
        """Entries that models reserve; padding ids start here."""
        return self.config.vocab_size

    @property
    def seq_len(self) -> int:
        """Tokens per caption after padding."""
        return self.config.seq_len

    @property
    def n_entries(self) -> int:
        """Entries that training really made, <= vocab_size."""
        return int(self._bpe.get_vocab_size())

    def ids(self, caption: str) -> list[int]:
        """The BPE ids of one caption, neither padded nor cut."""
        return list(self._bpe.encode(caption, add_special_tokens=False).ids)

    def encode(self, captions: Sequence[str], *, truncate: bool = False) -> Int[Tensor, "n t"]:
        """Tokens of captions, int64 (n, seq_len), padded at the end.

        Args:
            captions: Any text; white space around it is ignored.
            truncate: Cut a caption that is too long instead of refusing it.

        Raises:
            ValueError: If a caption is empty, or too long and not to be cut.
        """
        tokens = self.vocab_size + torch.arange(self.seq_len).repeat(len(captions), 1)
        for row, caption in zip(tokens, captions, strict=True):
            text = caption.strip()
            if not text:
                raise ValueError("caption must not be empty")
            ids = self.ids(text)
            if len(ids) > self.seq_len and not truncate:
                raise ValueError(f"caption must have at most {self.seq_len} tokens, got {len(ids)}: {_shorten(text)!r}")
            ids = ids[: self.seq_len]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; padding is left out."""
        return str(self._bpe.decode([token for token in tokens if token < self.vocab_size]))

    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, in plain types; travels inside checkpoints."""
        return {
            "format_version": _FORMAT_VERSION,
            "config": asdict(self.config),
            "bpe": self._bpe.to_str(),
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
        return cls(Tokenizer.from_str(record["bpe"]), TextTokenizerConfig(**record["config"]))

    @property
    def sha256(self) -> str:
        """Hash of all that decides the tokens of a caption."""
        content = f"{self.vocab_size}|{self.seq_len}|{self._bpe.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
