"""What a person reads of a survey, as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Any

from tabulate import tabulate

from dalle1.data.survey_report import PERCENTS

_WIDEST = 120  # columns
_BAR = 24
_MOST_ROWS = 14  # of a histogram
_NAMED = 3  # of each kind


def to_text(report: dict[str, Any]) -> str:
    """The tables of what `survey_report.summarize` gives, whose texts are safe to print."""
    sections = (_counts, _damages, _bad_samples, _sizes, _captions, _metadata, _image_tokens, _extremes, _filters)
    return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section(report))))


def _counts(report: dict[str, Any]) -> Iterator[str]:
    containers, n = report["containers"], report["samples"]
    noun = "shard" if all(name.lower().partition("?")[0].endswith(".tar") for name in containers) else "place"
    each = f"{min(containers.values()):,} to {max(containers.values()):,}" if len(containers) > 1 else ""
    yield f"{_number(n, 'sample')} in {_number(len(containers), noun)}{f', {each} in each' if each else ''}"
    yield ""
    rows = [
        (name, f"{part['samples']:,}", _share(part["samples"], n), _bytes(part["bytes"]))
        for name, part in report["parts"].items()
        if part["samples"] or name.startswith(("picture", "caption"))
    ]
    yield _table(("", "samples", "share", "bytes"), rows)
    facts = list(_facts(report))
    yield from ["", *facts] if facts else []


def _facts(report: dict[str, Any]) -> Iterator[str]:
    """What there is to say of pictures and keys in a line each."""
    pictures, n_pictures = report["pictures"], report["parts"]["picture"]["samples"]
    if pictures["formats"]:
        yield f"formats: {', '.join(f'{name} {count:,}' for name, count in pictures['formats'].items())}"
    if pictures["decoded"]:
        yield (
            f"decoded to the end: {pictures['decoded']:,} of {_number(n_pictures, 'picture')}; broken: "
            f"{pictures['broken']:,}; of one colour: {pictures['of_one_colour']:,}"
        )
    if small := pictures["below_image_size"]:
        size, share = report["settings"]["image_size"], _share(small, report["samples"])
        yield (
            f"a side below image_size={size}: {_number(small, 'picture')} ({share}); training enlarges them, "
            f"filters.min_side={size} drops them"
        )
    yield from _repeated("picture files that came before, byte for byte", pictures["identical_files"], _NAMED)
    yield from _repeated("keys that came before, in another shard or place", report["repeated_keys"], 1)


def _repeated(what: str, repeats: dict[str, Any], most_named: int) -> Iterator[str]:
    if repeats["repeated"]:
        yield f"{what}: {'' if repeats['is_exact'] else 'about '}{repeats['repeated']:,}"
        for each in repeats["most_frequent"][:most_named]:
            yield _cut(f"  {each['times']:,} times, from {_place(each['first'])} to {_place(each['last'])}")


def _damages(report: dict[str, Any]) -> Iterator[str]:
    if report["damages"]:
        yield "damage of shards, what is whole of them is counted"
        yield from _kinds(report["damages"])


def _bad_samples(report: dict[str, Any]) -> Iterator[str]:
    n = report["bad_samples"]
    if n:
        yield f"{_number(n, 'bad sample')} ({_share(n, report['samples'])}), by what is wrong"
        yield from _kinds(report["bad_samples_by_kind"])


def _kinds(kinds: dict[str, Any]) -> Iterator[str]:
    for kind, found in kinds.items():
        yield f"  {kind} ({found['count']:,})"
        yield from (_cut(f"    {sentence}") for sentence in found["first"][:_NAMED])


def _sizes(report: dict[str, Any]) -> Iterator[str]:
    measured = report["distributions"]
    if measured:
        rows = [
            (name, *(_measure(number) for number in (one["least"], *one["percentiles"].values(), one["most"])))
            for name, one in measured.items()
        ]
        yield _table(("", "least", *(f"{percent}%" for percent in PERCENTS), "most"), rows)
    for left, right in (
        ("short side (pixels)", "aspect (longer / shorter side)"),
        ("caption (words)", "caption (characters)"),
    ):
        blocks = [_histogram(name, measured[name]) for name in (left, right) if name in measured]
        if blocks:
            yield ""
            yield from _side_by_side(blocks)


def _histogram(name: str, one: dict[str, Any]) -> list[str]:
    counted = one["histogram"]
    if len(counted) > _MOST_ROWS:  # from powers of two to the next only
        wider: dict[float, int] = {}
        for low, _, n in counted:
            power = 1 << int(low).bit_length() >> 1
            wider[power] = wider.get(power, 0) + n
        counted = [[low, max(1, 2 * low), n] for low, n in wider.items()]
    most = max(n for _, _, n in counted)
    is_whole = not name.startswith("aspect")
    rows = [
        (_range(low, high, is_whole=is_whole), f"{n:,}", "#" * max(1, round(_BAR * n / most)))
        for low, high, n in counted
    ]
    if one["least"] == one["most"]:
        rows = [(_measure(one["least"]), *rows[0][1:])]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{label:>{widths[0]}} {count:>{widths[1]}} {bar}" for label, count, bar in rows]
    return [name, *lines]


def _range(low: float, high: float | None, *, is_whole: bool) -> str:
    """Whole numbers by the first and the last, others by where they begin and what they stay below."""
    if high is None:
        return f"{low:g} and more"
    if not is_whole:
        return f"{low:g}-{high:g}"
    return f"{low:,}" if high - low == 1 else f"{low:,}-{high - 1:,}"


def _side_by_side(blocks: Sequence[Sequence[str]]) -> Iterator[str]:
    width = max(len(line) for line in blocks[0]) + 4
    for lines in zip_longest(*blocks, fillvalue=""):
        yield f"{lines[0]:<{width}}{''.join(lines[1:])}".rstrip()


def _captions(report: dict[str, Any]) -> Iterator[str]:
    captions = report["captions"]
    if not captions["captions"]:
        yield "no sample has a caption: only the image tokenizer can be trained on them (stage=dvae)"
        return
    about = "" if captions["repeated"]["is_exact"] else "about "
    several = f" of {captions['samples']:,} samples" if captions["captions"] != captions["samples"] else ""
    yield f"{captions['captions']:,} captions{several}, {about}{captions['repeated']['different']:,} of them different"
    too_low = captions["most_frequent_too_low_by_at_most"]
    if captions["most_frequent"]:
        yield f"most frequent{f' (each up to {too_low:,} times more often)' if too_low else ''}:"
        width = len(f"{captions['most_frequent'][0][1]:,}")
        for caption, times in captions["most_frequent"]:
            yield _cut(f"  {times:>{width},}  {caption}")


def _metadata(report: dict[str, Any]) -> Iterator[str]:
    fields = report["metadata"]
    if not fields:
        return
    rows = [
        (textwrap.shorten(name, 30), _share(one["samples"], report["samples"]), ", ".join(one["kinds"]), _values(one))
        for name, one in fields.items()
    ]
    yield "metadata, for filters.json"
    yield _table(("field", "samples", "kind", "values"), rows, align=("left", "right", "left", "left"))
    if report["further_metadata_fields"]:
        yield f"further fields come {report['further_metadata_fields']:,} times"


def _values(one: dict[str, Any]) -> str:
    """Numbers by their percentiles, few values by their shares, others by examples."""
    if "values" in one and ("numbers" not in one or len(one["values"]) <= 3):
        text = ", ".join(f"{value or 'nothing'} {_share(n, one['samples'])}" for value, n in one["values"].items())
    elif "numbers" in one:
        shown = [("least", one["least"]), *((f"{p}%", one["percentiles"][str(p)]) for p in (5, 50, 95))]
        text = ", ".join(f"{name} {_measure(number)}" for name, number in [*shown, ("most", one["most"])])
    else:
        text = ", ".join(one["examples"])
    return textwrap.shorten(text, 64, placeholder=" ...")


def _image_tokens(report: dict[str, Any]) -> Iterator[str]:
    tokens = report["image_tokens"]
    if tokens is None:
        return
    crops = ", ".join(f"{n_crops} ({n:,} samples)" for n_crops, n in tokens["crops"].items())
    yield f"image tokens of {_number(tokens['samples'], 'sample')}: {tokens['tokens']:,}"
    yield f"  crops: {crops}"
    yield f"  grid: {', '.join(f'{grid} ({n:,} samples)' for grid, n in tokens['grids'].items())}"
    codebook = f"of {tokens['codebook']:,} " if tokens["codebook"] else ""
    yield (
        f"  codes: {tokens['codes_in_use']:,} {codebook}in use, the highest {tokens['highest_code']:,}; perplexity "
        f"{tokens['perplexity']:,.1f}"
    )


def _extremes(report: dict[str, Any]) -> Iterator[str]:
    for kind, mentions in report["extremes"].items():
        yield kind
        yield from (_cut(f"  {_cut(each['note'], 70)}  {_place(each)}") for each in mentions[:_NAMED])


def _filters(report: dict[str, Any]) -> Iterator[str]:
    n, dropped = report["samples"], report["dropped_by_filters"]
    if not report["settings"]["filters"]:
        yield "no filters are set: filters=paper sets the paper's, filters.min_side=256 and the like single ones"
        return
    kept = report["kept_by_filters"]
    yield f"filters keep {kept:,} of {_number(n, 'sample')} ({_share(kept, n)})"
    if dropped:
        yield ""
        rows = [
            (reason, f"{one['samples']:,}", _share(one["samples"], n), _cut(_place(one["examples"][0]), 60))
            for reason, one in dropped.items()
        ]
        yield _table(("left out", "samples", "share", "for example"), rows, align=("left", "right", "right", "left"))


def _place(mention: dict[str, Any]) -> str:
    return f"{mention['key']} in {PurePosixPath(mention['container']).name}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: Sequence[str] | None = None) -> str:
    align = align or ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers=headers, colalign=align, disable_numparse=True, preserve_whitespace=True)


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def _measure(number: float) -> str:
    """Whole numbers as they are, others with three digits."""
    return f"{number:,}" if isinstance(number, int) else f"{number:.3g}"


def _bytes(number: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


def _cut(line: str, width: int = _WIDEST) -> str:
    return line if len(line) <= width else f"{line[: width - 4]} ..."
