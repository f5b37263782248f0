"""Features of a set of pictures, computed once and kept; and the numbers that two sets give."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from dalle1.evaluation.chunks import CHUNK_SIZE, Chunks, compute_chunks
from dalle1.evaluation.distances import (
    INCEPTION_SPLITS,
    KID_SUBSETS,
    NEAREST,
    frechet_distance,
    inception_score,
    kernel_distance,
    kid_subset_size,
    precision_recall,
)
from dalle1.evaluation.extractors import Extractor, Features
from dalle1.evaluation.picture_sets import PictureSet, Treatment
from dalle1.evaluation.ranks import Ranks

PICTURES_AT_ONCE = 32  # that are in memory and go through a network together
_CAPTIONS_AT_ONCE = 64
_LONGEST_REASON = 160  # characters; reasons cite captions


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of pictures that were treated alike; read from the disk each time that they are asked for."""

    extractor: str  # its name
    n_features: int
    treatment: Treatment
    chunks: Chunks
    prefix: str = ""  # of the names of its tensors in the chunks

    def __len__(self) -> int:
        """Number of pictures."""
        return self.chunks.n

    def features(self) -> Tensor:
        """Float32 (n, d)."""
        name = f"{self.prefix}features"
        return self.chunks.load([name])[name]

    def probabilities(self) -> Tensor | None:
        """Float32 (n, c), of classes; None if the extractor has none."""
        name = f"{self.prefix}probabilities"
        return self.chunks.load([name]).get(name)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What was measured: under a name that says with what and of how many pictures."""

    values: dict[str, float]
    notes: list[str]

    def __or__(self, other: Numbers) -> Numbers:
        """Both; the same note once."""
        notes = list(dict.fromkeys([*self.notes, *other.notes]))
        return Numbers(values=self.values | other.values, notes=notes)


def extract(
    pictures: PictureSet,
    extractor: Extractor,
    treatment: Treatment,
    *,
    cache: Path,
    ranks: Ranks,
    label: str,
    chunk_size: int = CHUNK_SIZE,
) -> FeatureSet:
    """Features of all pictures: those that are in the cache, and the others computed by all processes.

    Raises: ValueError or OSError with one sentence if a picture cannot be read.
    """

    def compute(numbers: range) -> dict[str, Tensor]:
        groups = pictures.decoded(numbers, treatment, at_once=PICTURES_AT_ONCE)
        return tensors_of([extractor(group) for group in groups])

    recipe = {
        "what": "features",
        "pictures": pictures.sha256,
        "extractor": extractor.name,
        "treatment": treatment.facts,
        "at_once": PICTURES_AT_ONCE,
    }
    # What has no classes is not taken for what has.
    recipe |= {"classes": True} if extractor.has_classes else {}
    chunks = compute_chunks(
        compute, len(pictures), recipe=recipe, cache=cache, ranks=ranks, label=label, chunk_size=chunk_size
    )
    return FeatureSet(extractor=extractor.name, n_features=extractor.n_features, treatment=treatment, chunks=chunks)


def tensors_of(parts: Sequence[Features], prefix: str = "") -> dict[str, Tensor]:
    """Features of several groups of pictures as the tensors of a chunk."""
    tensors = {f"{prefix}features": torch.cat([part.features for part in parts])}
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    return tensors | ({f"{prefix}probabilities": torch.cat(probabilities)} if probabilities else {})


def compare(
    reference: FeatureSet,
    samples: FeatureSet,
    *,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    prefix: str = "",
    tag: str = "",
) -> Numbers:
    """FID, KID, precision and recall of samples against a reference.

    Args:
        reference: One side.
        samples: The other.
        rows: Which pictures of the reference count; all by default. The names say how many were left out.
        seed: Of the KID's subsets.
        prefix: Of the names, as the r of rFID.
        tag: More that the names say, after a comma.

    Raises: ValueError if the sets have other extractors or treatments, or less than 2 pictures.
    """
    if (reference.extractor, reference.treatment) != (samples.extractor, samples.treatment):
        raise ValueError(
            f"sets must have the same extractor and treatment to be compared, got {_described(reference)} and "
            f"{_described(samples)}"
        )
    of_reference, of_samples = reference.features(), samples.features()
    if rows is not None:
        of_reference = of_reference[list(rows)]
    counts = f"n={len(of_reference)}/{len(samples)}"
    what = f"{reference.extractor},{counts},blur={reference.treatment.blur:g}"
    left_out = len(reference) - len(of_reference)
    what += f",without={left_out}" if left_out else ""
    what += f",{tag}" if tag else ""
    values = {f"{prefix}fid[{what}]": frechet_distance(of_reference, of_samples)}
    size = kid_subset_size(len(of_reference), len(samples))
    kid = kernel_distance(of_reference, of_samples, subset_size=size, seed=seed)
    values[f"{prefix}kid[{what},subsets={KID_SUBSETS}x{size}]"] = kid.mean
    values[f"{prefix}kid_deviation[{what},subsets={KID_SUBSETS}x{size}]"] = kid.deviation
    notes = []
    if min(len(of_reference), len(samples)) > NEAREST:
        shares = precision_recall(of_reference, of_samples)
        values[f"{prefix}precision[{what},k={NEAREST}]"] = shares.precision
        values[f"{prefix}recall[{what},k={NEAREST}]"] = shares.recall
    else:
        notes.append(f"precision and recall need more than {NEAREST} pictures of each side, got {counts}: left out")
    if min(len(of_reference), len(samples)) <= reference.n_features:
        notes.append(
            f"{prefix}fid of {reference.extractor}, {counts}: a side has no more pictures than the "
            f"{reference.n_features} features, so it is far too high; compare it with equal counts alone"
        )
    return Numbers(values=values, notes=notes)


def class_score(samples: FeatureSet, *, tag: str = "") -> Numbers:
    """The inception score, where the extractor has classes and there are pictures enough; else nothing but a note."""
    probabilities = samples.probabilities()
    if probabilities is None:
        return Numbers(values={}, notes=[])
    if len(samples) < 2 * INCEPTION_SPLITS:
        needed = f"at least {2 * INCEPTION_SPLITS} pictures"
        return Numbers(values={}, notes=[f"the inception score needs {needed}, got {len(samples)}: left out"])
    score = inception_score(probabilities)
    what = f"{samples.extractor},n={len(samples)},blur={samples.treatment.blur:g},splits={INCEPTION_SPLITS}"
    what += f",{tag}" if tag else ""
    values = {f"inception_score[{what}]": score.mean, f"inception_score_deviation[{what}]": score.deviation}
    return Numbers(values=values, notes=[])


def read_captions(captions: Sequence[str], extractor: Extractor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Features of each caption, for `caption_score`, from an extractor that reads text.

    And the captions that it cannot read, such as are too long for it, with the reason.
    """
    distinct = list(dict.fromkeys(captions))
    starts = range(0, len(distinct), _CAPTIONS_AT_ONCE)
    texts: dict[str, Tensor] = {}
    unread: dict[str, str] = {}
    for start in tqdm(starts, desc=f"{extractor.name}, captions", delay=2.0, disable=None):
        group = distinct[start : start + _CAPTIONS_AT_ONCE]
        try:
            texts |= zip(group, extractor.text_features(group), strict=True)
        except ValueError:  # says nothing of the others
            for caption in group:
                try:
                    texts[caption] = extractor.text_features([caption])[0]
                except ValueError as error:
                    unread[caption] = str(error)
    return texts, unread


def caption_score(
    samples: FeatureSet,
    captions: Sequence[str],
    texts: Mapping[str, Tensor],
    unread: Mapping[str, str],
    *,
    tag: str = "",
) -> Numbers:
    """CLIP score: mean cosine of each picture and its caption, in [-1, 1], neither clipped at 0 nor scaled.

    `texts` and `unread` are what `read_captions` made of these captions with the extractor of the samples. Pictures
    with unread captions are left out: the name and a note say how many.
    """
    rows = [i for i, caption in enumerate(captions) if caption not in unread]
    left_out = len(captions) - len(rows)
    notes = []
    if left_out:
        reason = textwrap.shorten(next(iter(unread.values())), _LONGEST_REASON, placeholder="...")
        notes.append(
            f"{left_out} of {len(captions)} captions cannot be read by {samples.extractor} and are left out of its "
            f"CLIP score ({reason})"
        )
    if not rows:
        return Numbers(values={}, notes=notes)
    pictures = normalize(samples.features()[rows].double(), dim=1)
    cosines = (pictures * torch.stack([texts[captions[row]] for row in rows]).double()).sum(1)
    what = f"{samples.extractor},n={len(rows)},blur={samples.treatment.blur:g}"
    what += f",captions_left_out={left_out}" if left_out else ""
    what += f",{tag}" if tag else ""
    return Numbers(values={f"clip_score[{what}]": float(cosines.mean())}, notes=notes)


def _described(features: FeatureSet) -> str:
    facts = features.treatment.facts
    return f"{features.extractor} with size={facts['size']} and blur={facts['blur']:g}"
