"""BPE with dropout (Provilkov et al. 2020): the same caption in other pieces every time it is read.

The `tokenizers` library has this too, but draws from a generator of each thread that nobody can seed. Here the library
does all but the merging, so normalising, splitting and unknown characters are as without dropout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import groupby, pairwise
from random import Random
from typing import Any

from tokenizers import Tokenizer

_Merges = Mapping[tuple[int, int], tuple[int, int]]  # neighbours -> rank, 0 is merged first, and what they become
_NOTHING = -1  # where a symbol was merged away, and after the last one


class BPEDropout:
    """Splits text as a BPE does, but leaves out merges at random."""

    def __init__(self, bpe_json: str) -> None:
        """Take the merges of a BPE as the `tokenizers` library saves it; its special tokens are read as text.

        Raises: ValueError if it looks words up as a whole instead of merging (`ignore_merges`).
        """
        self._bpe_json = bpe_json
        content = json.loads(bpe_json)
        model = content["model"]
        if model["ignore_merges"]:
            raise ValueError("BPE dropout needs a BPE that merges, got one with ignore_merges; set optim.bpe_dropout=0")
        self._merges = _merges(model["vocab"], model["merges"], len(model["continuing_subword_prefix"] or ""))
        # What words are before the first merge, as the library sees it.
        self._unmerged = Tokenizer.from_str(json.dumps(content | {"model": model | {"merges": []}}))
        self._unmerged.encode_special_tokens = True

    def __reduce__(self) -> tuple[Any, ...]:
        # What the library pickles would find special tokens again.
        return BPEDropout, (self._bpe_json,)

    def ids(self, text: str, dropout: float, rng: Random, *, limit: int | None = None) -> list[int]:
        """Ids of `text` with each merge left out with probability `dropout`, in [0, 1], at every step.

        With `limit`, words after that many ids are not looked at; the ids may still be more.
        """
        start = self._unmerged.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for _, word in groupby(zip(start.word_ids, start.ids, strict=True), key=lambda symbol: symbol[0]):
            ids += merge([symbol for _, symbol in word], self._merges, dropout, rng)
            if limit is not None and len(ids) >= limit:
                break
        return ids


def merge(word: Sequence[int], merges: _Merges, dropout: float, rng: Random) -> list[int]:
    """Symbols of one word after all merges that are not left out.

    At every step each possible merge is left out with probability `dropout`, and the first in rank of the others (of
    equals the leftmost) is made; the word is done when none is left. Drawing in the order of ranks until one stays is
    the same and takes O(n log n) / (1 - dropout) steps for n symbols.
    """
    symbols = [*word, _NOTHING]
    after = list(range(1, len(symbols) + 1))
    before = list(range(-1, len(symbols) - 1))
    queue = [(merges[pair][0], left) for left, pair in enumerate(pairwise(word)) if pair in merges]
    heapify(queue)
    left_out: list[tuple[int, int]] = []
    while queue:
        rank, left = heappop(queue)
        right = after[left]
        merged = merges.get((symbols[left], symbols[right])) if symbols[left] != _NOTHING else None
        if merged is None or merged[0] != rank:
            continue  # one of the two has become something else
        if rng.random() < dropout:
            left_out.append((rank, left))
            continue
        symbols[left], symbols[right] = merged[1], _NOTHING
        after[left] = after[right]
        before[after[left]] = left
        for start in (before[left], left):
            possible = merges.get((symbols[start], symbols[after[start]])) if start >= 0 else None
            if possible is not None:
                heappush(queue, (possible[0], start))
        # The next step draws for all again.
        for candidate in left_out:
            heappush(queue, candidate)
        left_out.clear()
    return [symbol for symbol in symbols if symbol != _NOTHING]


def _merges(vocab: dict[str, int], pairs: list[list[str]], prefix_length: int) -> _Merges:
    """Merges by ids. `prefix_length` characters mark pieces inside words; they vanish when one joins what is before."""
    return {
        (vocab[left], vocab[right]): (rank, vocab[left + right[prefix_length:]])
        for rank, (left, right) in enumerate(pairs)
    }
