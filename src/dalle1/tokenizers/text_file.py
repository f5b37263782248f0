"""Text tokenizers from files: ours, and those that the `tokenizers` library saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from dalle1.tokenizers.text import TextTokenizer


def load_text_tokenizer(path: Path, *, vocab_size: int, seq_len: int) -> TextTokenizer:
    """The tokenizer that stage=tokenizer wrote, or any BPE in a `tokenizer.json` of the `tokenizers` library.

    The latter gets `vocab_size` and `seq_len`; ours brings its own. Special tokens of such a file are never found in
    captions, and what it says of dropout, truncation, padding and tokens to be added is not used.

    Raises: FileNotFoundError if there is no file; ValueError if it is something else or does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no text tokenizer at '{path}'; run 'python train.py stage=tokenizer' first, with this name= and "
            "experiment=, or give text_tokenizer=PATH"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if "format_version" in content:
            return TextTokenizer.from_dict(content)
        bpe = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exceptions for a damaged file
        raise ValueError(
            f"'{path}' is not a text tokenizer of stage=tokenizer or of the tokenizers library ({error}); "
            "delete it, or give another text_tokenizer=PATH"
        ) from error
    try:
        return _adopt(bpe, vocab_size=vocab_size, seq_len=seq_len)
    except ValueError as error:
        raise ValueError(f"'{path}' does not fit: {error}") from error


def _adopt(bpe: Tokenizer, **sizes: Any) -> TextTokenizer:
    """Make a library's tokenizer one that does nothing but split text."""
    model = bpe.model
    if not isinstance(model, models.BPE):
        raise ValueError(
            f"a text tokenizer must be a BPE, got {type(model).__name__}; give another text_tokenizer=PATH"
        )
    model.dropout = None
    bpe.no_truncation()
    bpe.no_padding()
    tokenizer = TextTokenizer(bpe, **sizes)
    for number, token in bpe.get_added_tokens_decoder().items():
        # Where words are looked up as a whole, text can still be read as a special token. Unknown text may.
        found = bpe.encode(token.content, add_special_tokens=False).ids
        if token.special and token.content != model.unk_token and number in found:
            raise ValueError(
                f"special tokens must not be found in captions, but the text {token.content!r} is read as one; "
                "give another text_tokenizer=PATH"
            )
    return tokenizer
