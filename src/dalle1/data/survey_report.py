"""All that a survey says, as plain types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dalle1.data.raw_sample import CAPTION, METADATA, PICTURE, TOKENS, RawSample
from dalle1.data.survey import NO_CAPTION, Survey, SurveyOptions, TokenCounts
from dalle1.data.tallies import Distribution, Examples, FieldValues, Mention, Repeats
from dalle1.data.token_shards import read_manifest
from dalle1.evaluation.codebook_usage import codebook_usage

FORMAT_VERSION = 1
PERCENTS = (1, 5, 25, 50, 75, 95, 99)
_PARTS = {PICTURE: "picture", CAPTION: "caption (.txt)", METADATA: "metadata (.json)", TOKENS: "image tokens (.npy)"}
# Ends of bins of `Distribution`, so that counts between them are exact.
LENGTH_EDGES = tuple(sorted({0, *(2**power for power in range(41)), *(3 * 2**power for power in range(40))}))
ASPECT_EDGES = (1, 1.0625, 1.125, 1.25, 1.375, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)
_MOST_FREQUENT = 10
_MOST_VALUES = 8  # different values of a field that are all told

Find = Callable[[int], RawSample]


def summarize(
    survey: Survey, options: SurveyOptions, *, places: Sequence[str] = (), find: Find | None = None
) -> dict[str, Any]:
    """All numbers, in plain types; in texts what cannot be printed is escaped.

    Args:
        survey: Of at least one sample.
        options: What was looked at.
        places: Where.
        find: Gives a sample by its number, where samples can be read again.
    """
    n_dropped = survey.dropped.counts.total()
    report = {
        "format_version": FORMAT_VERSION,
        "places": list(places),
        "settings": {
            "caption": options.caption.setting,
            "filters": {
                name: value
                for name, value in options.filters.to_dict().items()
                if value is not None and value is not False
            },
            "decode": options.decode,
            "image_size": options.image_size,
            "samples": options.samples,
            "seed": options.seed,
        },
        "samples": survey.n_samples,
        "containers": dict(survey.containers),
        "parts": {
            name: {"samples": survey.n_parts[part], "bytes": survey.n_bytes[part]} for part, name in _PARTS.items()
        },
        "damages": _kinds(survey.damages),
        **_bad_samples(survey),
        "repeated_keys": _repeats(survey.keys, find),
        "pictures": {
            "formats": dict(survey.formats.most_common()),
            "below_image_size": survey.n_small,
            "decoded": survey.n_decoded,
            "broken": survey.n_broken,
            "of_one_colour": survey.n_plain,
            "identical_files": _repeats(survey.files, find),
        },
        "captions": {
            "samples": survey.n_with_caption,
            "captions": survey.words.n,
            "repeated": _repeats(survey.captions, find),
            "most_frequent": [[caption, times] for caption, times in survey.frequent.most_frequent(_MOST_FREQUENT)],
            "most_frequent_too_low_by_at_most": survey.frequent.too_low,
        },
        "distributions": {
            name: _distribution(distribution, edges)
            for name, (distribution, edges) in distributions(survey).items()
            if distribution.n
        },
        "metadata": {name: _field(values) for name, values in survey.metadata.by_name.items()},
        "further_metadata_fields": survey.metadata.n_others,
        "extremes": {
            kind: [_mention(each) for each in survey.extremes.of(kind)] for kind in _kinds_that_differ(survey)
        },
        "drawn": [_mention(each) for each in survey.shown],
        "kept_by_filters": survey.n_samples - n_dropped,
        "dropped_by_filters": {
            reason: {"samples": n, "examples": [_mention(each) for each in survey.dropped.of(reason)]}
            for reason, n in survey.dropped.counts.most_common()
        },
        "image_tokens": _tokens(survey.tokens, survey.containers) if survey.tokens.crops else None,
    }
    cleaned: dict[str, Any] = _clean(report)
    return cleaned


def distributions(survey: Survey) -> dict[str, tuple[Distribution, Sequence[float]]]:
    """What was measured, and the edges that it is counted between."""
    return {
        "short side (pixels)": (survey.short_sides, LENGTH_EDGES),
        "aspect (longer / shorter side)": (survey.aspects, ASPECT_EDGES),
        "picture file (bytes)": (survey.file_bytes, LENGTH_EDGES),
        "caption (words)": (survey.words, LENGTH_EDGES),
        "caption (characters)": (survey.characters, LENGTH_EDGES),
    }


def visible(text: str) -> str:
    """The text with all escaped that is no letter, sign or plain space: it moves no cursor and hides nothing."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {_clean(name): _clean(each) for name, each in value.items()}
    return [_clean(each) for each in value] if isinstance(value, list) else value


def _sample(sample: RawSample | Mention) -> dict[str, Any]:
    return {"key": sample.key, "container": sample.container}


def _mention(mention: Mention) -> dict[str, Any]:
    return _sample(mention) | ({"note": mention.note} if mention.note else {})


def _kinds(examples: Examples) -> dict[str, Any]:
    return {
        kind: {"count": n, "first": [mention.note for mention in examples.of(kind)]}
        for kind, n in examples.counts.most_common()
    }


def _kinds_that_differ(survey: Survey) -> list[str]:
    """Of what all samples have alike, none is extreme."""
    alike = {
        "pixels": survey.short_sides.is_one_number and survey.aspects.is_one_number,
        "aspect": survey.aspects.is_one_number,
        "files": survey.file_bytes.is_one_number,
        "captions": survey.characters.is_one_number,
    }
    return [kind for kind in survey.extremes.counts if not alike[kind.split()[-1]]]


def _bad_samples(survey: Survey) -> dict[str, Any]:
    """Where no sample has a caption, that is not what is wrong with them."""
    kinds = _kinds(survey.bad)
    if survey.has_captions:
        return {"bad_samples": survey.n_bad, "bad_samples_by_kind": kinds}
    kinds.pop(NO_CAPTION, None)
    return {"bad_samples": survey.n_bad - survey.n_only_without_caption, "bad_samples_by_kind": kinds}


def _repeats(repeats: Repeats, find: Find | None) -> dict[str, Any]:
    """Of contents, how many are different and how many were there before."""
    several = [] if find is None else repeats.examples(5)
    return {
        "different": repeats.n_distinct,
        "repeated": repeats.n_repeated,
        "is_exact": repeats.is_exact,
        "most_frequent": [
            {"times": times, "first": _sample(find(first)), "last": _sample(find(last))}
            for times, first, last in several
            if find is not None
        ],
    }


def _distribution(distribution: Distribution, edges: Sequence[float]) -> dict[str, Any]:
    counts = distribution.count(edges)
    return {
        "n": distribution.n,
        "least": _plain(distribution.least),
        "percentiles": {str(percent): _plain(distribution.percentile(percent)) for percent in PERCENTS},
        "most": _plain(distribution.most),
        "histogram": [[low, high, n] for low, high, n in zip(edges, [*edges[1:], None], counts, strict=True) if n],
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _field(values: FieldValues) -> dict[str, Any]:
    is_few = not values.n_others and len(values.values) <= _MOST_VALUES
    content: dict[str, Any] = {"samples": values.n, "kinds": dict(values.kinds.most_common())}
    if is_few:
        content["values"] = dict(values.values.most_common())
    else:
        content["examples"] = list(values.values)[:3]
    if 2 * values.numbers.n > values.n:
        numbers = values.numbers
        percentiles = {str(percent): _plain(numbers.percentile(percent)) for percent in PERCENTS}
        least, most = _plain(numbers.least), _plain(numbers.most)
        content |= {"numbers": numbers.n, "least": least, "percentiles": percentiles, "most": most}
    return content


def _tokens(tokens: TokenCounts, containers: Counter[str]) -> dict[str, Any]:
    vocab_size = _vocab_size(containers)
    highest = len(tokens.codes) - 1
    counts = torch.from_numpy(tokens.codes)
    if vocab_size is not None and vocab_size > highest:
        counts = torch.nn.functional.pad(counts, (0, vocab_size - len(counts)))
    usage = codebook_usage(counts)
    return {
        "samples": tokens.crops.total(),
        "crops": {str(n_crops): n for n_crops, n in sorted(tokens.crops.items())},
        "grids": dict(tokens.grids.most_common(20)),
        "tokens": usage.n_tokens,
        "codebook": vocab_size,  # None if there is no tokens.json
        "highest_code": highest,
        "codes_in_use": usage.n_used,
        "perplexity": usage.perplexity,
    }


def _vocab_size(containers: Counter[str]) -> int | None:
    """What tokens.json says, if one is beside all shards."""
    directories = {Path(container).parent for container in containers}
    try:
        return read_manifest(directories.pop()).vocab_size if len(directories) == 1 else None
    except (ValueError, OSError):
        return None
