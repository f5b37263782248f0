"""How the captions of a data set become tokens in training."""

from __future__ import annotations

from random import Random

from dalle1.data.preparation import EncodedCaption
from dalle1.tokenizers.bpe_dropout import BPEDropout
from dalle1.tokenizers.text import TextTokenizer

# A caption that has more characters for each token that it may have is not read to its end: a hostile one of a megabyte
# would take seconds. Words of ours have at most 20 characters a token, and 100 are more than any language has.
_CHARACTERS_PER_TOKEN = 100


class CaptionEncoder:
    """Encodes captions one at a time (see `preparation.EncodeText`); loader workers may pickle it."""

    def __init__(self, tokenizer: TextTokenizer, *, truncate: bool, bpe_dropout: float = 0.0) -> None:
        """Encode with `tokenizer`.

        Args:
            tokenizer: Gives the tokens.
            truncate: Cut captions that are too long instead of refusing them.
            bpe_dropout: Probability of leaving out a merge, in [0, 1); only captions with a draw have it.

        Raises: ValueError as `BPEDropout` does, if there is dropout.
        """
        self._tokenizer = tokenizer
        self._truncate = truncate
        self._dropout = bpe_dropout
        self._splitter = BPEDropout(tokenizer.bpe_json) if bpe_dropout else None

    def __call__(self, caption: str, draw: str | None) -> EncodedCaption:
        """Tokens of one caption, and whether it is cut, which dropout does not decide.

        Dropout makes captions longer. One that fits without it and not with it is cut, but where captions must not be
        cut this draw has no dropout. Of one with more than 100 characters for each token only these are looked at.

        Args:
            caption: Any text; white space around it is ignored.
            draw: Seed of this caption's dropout; None for no dropout.

        Raises: ValueError if the caption is empty, or too long and not to be cut.
        """
        seq_len = self._tokenizer.seq_len
        limit = _CHARACTERS_PER_TOKEN * seq_len
        caption = caption.strip()
        is_endless = len(caption) > limit
        if is_endless and not self._truncate:
            raise ValueError(
                f"caption must have at most {seq_len} tokens, got one of {len(caption):,} characters; "
                "truncate_captions=true would cut it"
            )
        caption = caption[:limit]
        ids = self._tokenizer.ids(caption)
        if not self._truncate:
            try:
                self._tokenizer.check_length(ids, caption)
            except ValueError as error:
                raise ValueError(f"{error}; truncate_captions=true would cut it") from error
        is_cut = is_endless or len(ids) > seq_len
        if draw is not None and self._splitter is not None:
            # A text's hash, so that numbers which lie close give draws that have nothing in common.
            drawn = self._splitter.ids(caption, self._dropout, Random(draw), limit=seq_len + 1)
            if self._truncate or len(drawn) <= seq_len:
                ids = drawn
        return EncodedCaption(tokens=self._tokenizer.pad(ids), is_cut=is_cut)
