"""What was found wrong with samples and shards while reading: named, counted, and a reason to stop if it is much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

CUT_CAPTION = "caption cut"  # the one finding that does not make a sample bad
# So many are told apart, so that each counts once however often it is met; of further ones every meeting counts.
MOST_NAMED = 10_000
# Before so many samples were read, a few bad ones say nothing of the share.
SAMPLES_TO_JUDGE = 100


class Findings:
    """The bad samples met so far, and those whose caption was cut."""

    def __init__(self, *, max_bad_fraction: float = 1.0) -> None:
        """Stop reading when more than `max_bad_fraction` of the samples that were wanted were bad."""
        self.named: dict[str, str] = {}  # words that find the sample or shard again -> what is wrong, in a few words
        self.unnamed: Counter[str] = Counter()  # of those beyond MOST_NAMED
        self._max_bad_fraction = max_bad_fraction
        self._n_wanted = self._n_bad = 0  # of this start; a sample that is met again counts again

    def add(self, found: Mapping[str, str], *, n_wanted: int = 0) -> None:
        """Note what was found in making `n_wanted` samples.

        Raises: ValueError if too large a share of all that were wanted is bad.
        """
        for sample, kind in found.items():
            if sample in self.named:
                continue
            if len(self.named) < MOST_NAMED:
                self.named[sample] = kind
            else:
                self.unnamed[kind] += 1
        self._n_wanted += n_wanted
        self._n_bad += sum(kind != CUT_CAPTION for kind in found.values())
        if self._n_wanted >= SAMPLES_TO_JUDGE:
            self.judge()

    def judge(self) -> None:
        """Raise ValueError if too large a share of the samples that were read is bad."""
        met = self._n_wanted + self._n_bad
        if self._n_bad > self._max_bad_fraction * met:
            kinds = ", ".join(f"{kind} ({count:,})" for kind, count in self.count().most_common(5))
            raise ValueError(
                f"at most {self._max_bad_fraction:g} of the samples that are read may be bad (data.max_bad_fraction), "
                f"got {self._n_bad:,} of {met:,} (one that comes again counts again): {kinds}; mend the data or raise "
                "that share"
            )

    def count(self) -> Counter[str]:
        """How many samples and shards there are of each kind, cut captions included."""
        return Counter(self.named.values()) + self.unnamed

    def state_dict(self) -> dict[str, Any]:
        """What to save, in plain types."""
        return {"named": dict(self.named), "unnamed": dict(self.unnamed)}

    def load_state_dict(self, state: Mapping[str, Any], *, with_unnamed: bool = True) -> None:
        """Add what was saved; those that cannot be told apart only on one device, or they would count on each."""
        self.named |= state["named"]
        if with_unnamed:
            self.unnamed.update(state["unnamed"])


def join_findings(parts: Iterable[Findings]) -> Counter[str]:
    """Counts over several devices and splits: what can be told apart counts once."""
    named: dict[str, str] = {}
    unnamed: Counter[str] = Counter()
    for part in parts:
        named |= part.named
        unnamed += part.unnamed
    return Counter(named.values()) + unnamed
