"""Samples by their numbers, and what happens to those that cannot be used."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Literal

from torch import Tensor
from torch.utils.data import Dataset

from dalle1.data.findings import Findings
from dalle1.data.preparation import Preparation, Sample
from dalle1.data.raw_sample import BadSampleError
from dalle1.data.sample_index import SampleIndex
from dalle1.data.shard_scan import Damage

logger = logging.getLogger(__name__)

OnBadSample = Literal["error", "skip"]
# So many bad samples in a row, drawn from all over the data set, are no bad luck.
MOST_TRIES = 1000
_MOST_LOGGED = 20  # lines for bad samples of one kind in one process; further ones are only counted


class BadSamples:
    """What is done about bad samples and damaged shards: they are errors, or are logged and passed over."""

    def __init__(self, policy: OnBadSample, *, option: str = "data.on_bad_sample") -> None:
        """Follow `policy`, which users set with `option`."""
        self._policy = policy
        self._option = option
        self._logged: dict[str, set[str]] = {}  # by kind

    def pass_over(self, error: BadSampleError) -> None:
        """Log a bad sample. Raises: BadSampleError with the way out, if those are errors."""
        if self._policy == "error":
            raise BadSampleError(f"{error}; remove it, or set {self._option}=skip", error.kind) from error
        self._log(str(error), error.kind)

    def pass_over_damage(self, damage: Damage) -> None:
        """Log what is wrong with a shard. Raises: BadSampleError with the way out, if that is an error."""
        if self._policy == "error":
            raise BadSampleError(f"{damage.message}, or set {self._option}=skip", damage.kind)
        self._log(damage.message, damage.kind)

    def _log(self, message: str, kind: str) -> None:
        logged = self._logged.setdefault(kind, set())
        if len(logged) < _MOST_LOGGED and message not in logged:
            logged.add(message)
            logger.warning("skipped: %s", message)
            if len(logged) == _MOST_LOGGED:
                logger.warning("more of this kind (%s) are counted, but not named", kind)


class PairDataset(Dataset[Sample]):
    """The samples of a `SampleIndex` with their pictures decoded and, if wanted, their captions encoded.

    Each is a function of its number, its draw and the preparation; without augmentation and `vary_text`, of its number
    alone.

    A sample is bad if its picture is missing or cannot be decoded (or is small, if that is refused) and, when text is
    encoded, if its caption is missing, empty, not UTF-8 or refused by the encoder. Without an encoder captions are not
    even read.

    Attributes:
        index: Where the samples are.
        preparation: What is made of them.
        findings: The bad samples met so far and those whose caption was cut. The loaders add what their workers met, so
            in the main process it is complete.
    """

    def __init__(
        self,
        index: SampleIndex,
        preparation: Preparation,
        *,
        on_bad_sample: OnBadSample = "error",
        max_bad_fraction: float = 1.0,
        cache_images: bool = False,
    ) -> None:
        """Read from `index`.

        Args:
            index: The samples.
            preparation: What is made of them.
            on_bad_sample: `error` raises; `skip` takes another sample instead, which is a function of the number of the
                bad one, and logs bad samples (once per process if there are loader workers).
            max_bad_fraction: With `skip`, the share of bad samples among those read above which reading stops.
            cache_images: Keep every decoded picture in memory, 3 * image_size^2 bytes each; not with augmentation.
                Without loader workers all epochs but the first decode nothing; each worker keeps pictures of its own.

        Raises:
            ValueError: For `cache_images` with augmentation.
        """
        if cache_images and preparation.augmentation != "none":
            raise ValueError(
                "cache_images must be false with augmentation, which makes other pixels each time, got true with "
                f"augmentation={preparation.augmentation}; set one of them"
            )
        self.index = index
        self.preparation = preparation
        self._bad_samples = BadSamples(on_bad_sample)
        self._cache: dict[int, Tensor] | None = {} if cache_images else None
        self._n_samples = len(index)
        self._stride = _coprime_stride(self._n_samples)
        self.findings = Findings(max_bad_fraction=max_bad_fraction)
        self.findings.add({damage.message: damage.kind for damage in index.damages})
        for damage in index.damages:
            self._bad_samples.pass_over_damage(damage)

    def __len__(self) -> int:
        """Number of samples, bad ones included."""
        return self._n_samples

    def __getitem__(self, i: int) -> Sample:
        """Sample `i` in its first draw, see `sample`."""
        return self.sample(i, draw=0)

    def sample(self, i: int, draw: int) -> Sample:
        """Sample `i`, or the one that replaces it; its `index` and `key` are those of the sample returned.

        Raises: BadSampleError for a bad sample if those are errors, and if all samples seem to be bad.
        """
        findings: dict[str, str] = {}
        n_tries = min(len(self), MOST_TRIES)
        for attempt in range(n_tries):
            candidate = (i + attempt * self._stride) % len(self)
            try:
                return self._load(candidate, draw, findings)
            except BadSampleError as error:
                self._bad_samples.pass_over(error)
                findings[self.index[candidate].describe()] = error.kind
                last = str(error)  # not the error itself, which would keep all that led to it, the picture too
        raise BadSampleError(f"at least one sample must be good, got {n_tries} bad ones; the last: {last}")

    def captions(self) -> Iterator[str]:
        """All good captions in the order of the index, to train a tokenizer on; no picture is read.

        Raises: BadSampleError for a missing, empty or undecodable caption if bad samples are errors.
        """
        for i in range(len(self)):
            raw = self.index[i]
            try:
                captions = self.preparation.caption.read(raw)
            except BadSampleError as error:
                self._bad_samples.pass_over(error)
                self.findings.add({raw.describe(): error.kind}, n_wanted=1)
            else:
                self.findings.add({}, n_wanted=1)
                yield from captions

    def _load(self, i: int, draw: int, findings: dict[str, str]) -> Sample:
        raw = self.index[i]
        pixels = None
        if self._cache is not None and self.preparation.tokens is None:
            if i not in self._cache:
                self._cache[i] = self.preparation.pixels(raw, i, draw)
            pixels = self._cache[i]
        return self.preparation.sample(raw, i, draw, index=i, findings=findings, pixels=pixels)


def _coprime_stride(n_samples: int) -> int:
    """Steps of it lead through all numbers below `n_samples`, far from each other: a bad shard is left at once."""
    golden = (math.sqrt(5) - 1) / 2
    stride = max(1, round(golden * n_samples))
    while math.gcd(stride, n_samples) > 1:
        stride += 1
    return stride
