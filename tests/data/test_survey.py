"""What is counted of a data set: bounded counters, samples of every kind, what filters drop, several processes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_files import serve
from PIL import Image

from dalle1.data import survey_scan
from dalle1.data.captions import CaptionSource
from dalle1.data.filter_scan import filter_index
from dalle1.data.filters import FilterConfig
from dalle1.data.remote import expand_addresses
from dalle1.data.shards import ShardIndex
from dalle1.data.sources import open_index
from dalle1.data.survey import Survey, SurveyOptions
from dalle1.data.survey_pictures import block_of_samples, blocks_of_dropped
from dalle1.data.survey_report import summarize
from dalle1.data.survey_scan import survey_index, survey_stream
from dalle1.data.survey_text import to_text
from dalle1.data.token_shards import EncodedSample, TokenManifest, write_manifest, write_token_shard

Members = list[tuple[str, bytes]]
WriteShard = Callable[[str, Members], str]
MakeSamples = Callable[..., Members]
Encode = Callable[..., bytes]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def shards(write_shard: WriteShard, encode: Encode) -> list[str]:
    """Samples that are good, and one of each kind that is not; a shard that is cut short, and one that is no tar."""
    jpeg = encode(noise(40, 40), "JPEG")
    members: Members = []
    for number, (width, height) in enumerate([(8, 8), (20, 8), (8, 17), (30, 30), (8, 8)]):
        members += [(f"{number}.png", encode(noise(width, height))), (f"{number}.txt", b"word " * (number + 1))]
        members.append((f"{number}.json", json.dumps({"similarity": number / 10, "NSFW": "no"}).encode()))
    members += [("plain.webp", encode(Image.new("RGB", (50, 50), "red"), "WebP")), ("plain.txt", b"one colour")]
    members += [("half.jpg", jpeg[: len(jpeg) // 2]), ("half.txt", b"a picture that ends")]
    members += [("page.jpg", b"\n<!DOCTYPE html>404"), ("page.txt", b"a web page")]
    members += [("empty.jpg", b""), ("empty.txt", b"an empty file")]
    members += [("no-picture.txt", b"a caption alone"), ("no-caption.jpg", jpeg)]
    members += [("not-utf8.jpg", jpeg), ("not-utf8.txt", b"\xff\xfe"), ("blank.jpg", jpeg), ("blank.txt", b" \n")]
    members += [("list.jpg", jpeg), ("list.txt", b"a list"), ("list.json", b"[1]")]
    members += [("broken.jpg", jpeg), ("broken.txt", b"broken metadata"), ("broken.json", b"{")]
    members += [("list.jpg", jpeg), ("../out.jpg", jpeg)]
    first, second = write_shard("a.tar", members), write_shard("b.tar", members[:30])
    content = Path(second).read_bytes()
    Path(second).write_bytes(content[:7000])
    third = write_shard("c.tar", [])
    Path(third).write_bytes(b"no tar")
    return [first, second, third]


def inspected(places: list[str], **options: Any) -> dict[str, Any]:
    index = open_index(places, skip_damage=True)
    chosen = SurveyOptions(**options)
    return summarize(survey_index(index, chosen), chosen, find=index.__getitem__)


def count(kinds: dict[str, Any]) -> dict[str, int]:
    return {kind: found["count"] for kind, found in kinds.items()}


def test_every_kind_of_sample_and_damage_is_counted(shards: list[str]) -> None:
    report = inspected(shards[:1], image_size=9)
    assert report["samples"] == 15
    assert report["containers"] == {shards[0]: 15}
    assert {name: part["samples"] for name, part in report["parts"].items()} == {
        "picture": 14,
        "caption (.txt)": 14,
        "metadata (.json)": 7,
        "image tokens (.npy)": 0,
    }
    assert count(report["damages"]) == {"key used twice": 1, "name leads out of the shard": 1}
    assert report["bad_samples"] == 9
    assert count(report["bad_samples_by_kind"]) == {
        "picture cannot be decoded": 3,
        "no picture": 1,
        "no caption": 1,
        "caption not UTF-8": 1,
        "empty caption": 1,
        "metadata not an object": 1,
        "metadata not JSON": 1,
    }
    assert report["bad_samples_by_kind"]["no picture"]["first"] == [
        f"sample 'no-picture' in {shards[0]!r} has no picture (.jpg, .jpeg, .png or .webp)"
    ]
    pictures = report["pictures"]
    assert pictures["formats"] == {"JPEG": 6, "PNG": 5, "WebP": 1, "HTML": 1, "empty": 1}
    assert (pictures["decoded"], pictures["broken"], pictures["of_one_colour"]) == (12, 1, 1)
    assert pictures["below_image_size"] == 4
    assert pictures["identical_files"]["repeated"] == 1 + 4
    first = pictures["identical_files"]["most_frequent"][0]
    assert (first["times"], first["first"]["key"], first["last"]["key"]) == (5, "no-caption", "broken")
    captions = report["captions"]
    assert (captions["samples"], captions["captions"], captions["repeated"]["different"]) == (12, 12, 12)
    assert report["distributions"]["short side (pixels)"]["n"] == 12
    assert report["distributions"]["short side (pixels)"]["histogram"] == [
        [8, 12, 4],
        [24, 32, 1],
        [32, 48, 6],
        [48, 64, 1],
    ]
    assert report["distributions"]["caption (words)"]["most"] == 5
    extremes = {kind: found[0]["key"] for kind, found in report["extremes"].items()}
    assert extremes == {
        "fewest pixels": "0",
        "most pixels": "plain",
        "most extreme aspect": "1",
        "smallest files": "empty",
        "largest files": "3",
        "shortest captions": "0",
        "longest captions": "4",
    }
    similarity, nsfw = report["metadata"]["similarity"], report["metadata"]["NSFW"]
    assert (similarity["samples"], similarity["least"], similarity["most"]) == (5, 0, 0.4)
    assert nsfw["values"] == {"no": 5}


def test_damage_of_shards_is_told_beside_what_is_whole(shards: list[str]) -> None:
    report = inspected(shards)
    assert report["containers"][shards[0]] == 15
    assert 0 < report["containers"][shards[1]] < 10
    assert shards[2] not in report["containers"]
    assert count(report["damages"]) == {
        "key used twice": 1,
        "name leads out of the shard": 1,
        "shard is truncated": 1,
        "shard is no tar": 1,
    }
    assert report["repeated_keys"]["repeated"] == report["containers"][shards[1]]
    text = to_text(report)
    assert f"shard '{shards[1]}' is truncated"[:100] in text
    assert "picture cannot be decoded (3)" in text


FILTERS: list[dict[str, Any]] = [
    {"min_side": 9, "max_aspect": 2, "min_caption_words": 2},
    {"json": {"similarity": {"min": 0.2}, "NSFW": ["no"]}},
    {"max_caption_characters": 12, "boilerplate": True},
    {"near_duplicates": 0},
    {"near_duplicates": 6, "min_caption_words": 2},
    {"near_duplicates": 0, "min_caption_words": 5},  # no two of what is left are alike
]


@pytest.mark.parametrize("filters", FILTERS)
def test_filters_drop_what_they_drop_before_training(shards: list[str], filters: dict[str, Any]) -> None:
    config = FilterConfig(**filters)
    index = open_index(shards, skip_damage=True)
    expected = filter_index(index, config, CaptionSource())
    options = SurveyOptions(filters=config)
    survey = survey_index(index, options)
    report = summarize(survey, options, find=index.__getitem__)
    assert +survey.dropped.counts == +expected.dropped
    assert report["kept_by_filters"] == len(expected.index)
    kept = {(sample.container, sample.key) for sample in expected.index}
    for found in report["dropped_by_filters"].values():
        assert not {(example["container"], example["key"]) for example in found["examples"]} & kept
    assert sum(len(block.pictures) > 0 for block in blocks_of_dropped(survey, options, index.__getitem__)) == len(
        +expected.dropped
    )


def test_near_duplicate_is_shown_beside_what_it_is_like(shards: list[str]) -> None:
    index = open_index(shards[:1], skip_damage=True)
    survey = survey_index(index, SurveyOptions(filters=FilterConfig(near_duplicates=0)))
    pairs = {mention.key: index[mention.like or 0].key for mention in survey.dropped.of("near-duplicate")}
    assert pairs["4"] == "0"
    assert pairs["broken"] == "no-caption"


def test_several_processes_count_what_one_counts(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_scan, "_LEAST_PART", 3)
    options = SurveyOptions(filters=FilterConfig(**FILTERS[4]), samples=5, decode=7)
    index = open_index(shards, skip_damage=True)
    alone, together = (survey_index(index, options, num_workers=number) for number in (0, 2))
    assert summarize(together, options, find=index.__getitem__) == summarize(alone, options, find=index.__getitem__)
    assert together.drawn.of("") == alone.drawn.of("")


# Of the samples 2, 4, 7, 9, 12 and 14 two have no picture whose header is good; 6 ends within its pixels.
@pytest.mark.parametrize(("decode", "n_decoded", "n_broken"), [(0, 0, 0), (6, 4, 0), (None, 12, 1)])
def test_pictures_are_decoded_as_far_as_wanted(
    shards: list[str], decode: int | None, n_decoded: int, n_broken: int
) -> None:
    pictures = inspected(shards[:1], decode=decode)["pictures"]
    assert (pictures["decoded"], pictures["broken"]) == (n_decoded, n_broken)


def test_drawn_pictures_are_spread_evenly(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    index = open_index([write_shard("a.tar", make_samples(10))])
    surveyor = survey_scan._IndexSurveyor(index, SurveyOptions(decode=4))
    assert [number for number in range(10) if surveyor._decodes(number)] == [2, 4, 7, 9]


def test_same_seed_draws_the_same_samples(write_shard: WriteShard, make_samples: MakeSamples) -> None:
    index = open_index([write_shard("a.tar", make_samples(30))])
    drawn = [survey_index(index, SurveyOptions(samples=5, seed=seed)).drawn.of("") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({mention.key for mention in drawn[0]}) == 5


def test_shards_from_elsewhere_are_the_same(write_shard: WriteShard, make_samples: MakeSamples, encode: Encode) -> None:
    members = [*make_samples(4), ("bad.jpg", b"broken"), ("bad.txt", b"a caption")]
    shards = [write_shard("0.tar", members), write_shard("1.tar", make_samples(3, start=4))]
    options = SurveyOptions(filters=FilterConfig(min_caption_words=3, max_caption_words=9), samples=3)
    index = open_index(shards)
    local = survey_index(index, options)
    with serve(Path(shards[0]).parent) as (address, _):
        remote = survey_stream(expand_addresses([f"{address}/{{0..2}}.tar"]), options)
    expected, report = summarize(local, options), summarize(remote, options)
    assert count(report["damages"]) == {"shard cannot be read": 1}
    assert list(report["containers"]) == [f"{address}/{number}.tar" for number in range(2)]
    for name in ("samples", "parts", "pictures", "captions", "distributions", "metadata", "bad_samples"):
        assert report[name] == expected[name], name
    assert [mention.key for mention in remote.drawn.of("")] == [mention.key for mention in local.drawn.of("")]
    # Pictures to show are kept, since there is no way back.
    assert remote.dropped.of("caption below 3 words")[0].raw is not None
    there = block_of_samples(remote, options, None)
    here = block_of_samples(local, options, index.__getitem__)
    assert there is not None
    assert here is not None
    assert [picture.tobytes() for picture in there.pictures] == [picture.tobytes() for picture in here.pictures]


def test_near_duplicates_are_not_looked_for_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"filters\.near_duplicates must be null for shards that are read .* got 4"):
        survey_stream(["https://host/a.tar"], SurveyOptions(filters=FilterConfig(near_duplicates=4)))


HOSTILE = "\x1b[31mred\x1b[0m \u202eevil\nfiles: forged \x07\u009b2J\u2028end"


def test_hostile_texts_reach_no_terminal(write_shard: WriteShard, encode: Encode) -> None:
    picture = encode(noise(9, 9))
    members = [
        (f"{key}.{extension}", content)
        for key in ("evil\x1b[2Jkey\n", "half\udcff", "other")
        for extension, content in (
            ("png", picture),
            ("txt", HOSTILE.encode()),
            ("json", json.dumps({HOSTILE: HOSTILE, "half": "\ud83d"}).encode()),
        )
    ]
    shard = write_shard(
        "a.tar", [(os.fsencode(name).decode("utf-8", "surrogateescape"), data) for name, data in members]
    )
    report = inspected([shard], filters=FilterConfig(min_side=99))
    text = to_text(report)
    assert all(line.isprintable() for line in text.splitlines())
    assert not [line for line in text.splitlines() if line.startswith("files: forged")]
    assert r"\x1b[31mred\x1b[0m \u202eevil\nfiles: forged" in text
    content = json.dumps(report, ensure_ascii=False)
    assert content.isprintable()
    content.encode()


def test_samples_without_any_caption_are_not_bad(write_shard: WriteShard, encode: Encode) -> None:
    report = inspected([write_shard("a.tar", [(f"{i}.png", encode(noise(9, 9, i))) for i in range(3)])])
    assert (report["bad_samples"], report["bad_samples_by_kind"]) == (0, {})
    text = to_text(report)
    assert "no sample has a caption: only the image tokenizer can be trained on them (stage=dvae)" in text
    assert "bad sample" not in text


def test_captions_are_read_where_the_option_says(write_shard: WriteShard, encode: Encode) -> None:
    metadata = b'{"captions": ["a cat", "a small cat", "a cat"]}'
    shard = write_shard("a.tar", [("1.png", encode(noise(9, 9))), ("1.json", metadata)])
    captions = inspected([shard], caption=CaptionSource(setting="json:captions"))["captions"]
    assert (captions["samples"], captions["captions"], captions["repeated"]["different"]) == (1, 3, 2)
    assert captions["most_frequent"] == [["a cat", 2]]


def test_words_are_counted_as_filters_count_them(write_shard: WriteShard, encode: Encode) -> None:
    shard = write_shard("a.tar", [("1.png", encode(noise(9, 9))), ("1.txt", "a \u2013 cat's «2» !!".encode())])
    n_words = inspected([shard])["distributions"]["caption (words)"]["most"]
    index = open_index([shard])
    assert len(filter_index(index, FilterConfig(min_caption_words=n_words), CaptionSource()).index) == 1
    with pytest.raises(ValueError, match="loosen them"):
        filter_index(index, FilterConfig(min_caption_words=n_words + 1), CaptionSource())


def test_folders_and_tables_are_looked_at_too(tmp_path: Path, encode: Encode) -> None:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.png").write_bytes(encode(noise(9, 9)))
    (folder / "deep" / "a.txt").write_text("in a folder")
    table = tmp_path / "list.csv"
    table.write_text("path,caption,score\npictures/deep/a.png,in a table,7\ngone.png,of nothing,0.5\n")
    report = inspected([str(folder), str(table)])
    assert report["containers"] == {str(folder): 1, str(table): 2}
    assert report["parts"]["picture"]["samples"] == 2
    assert count(report["bad_samples_by_kind"]) == {"cannot be read": 1}
    assert report["pictures"]["identical_files"]["repeated"] == 1
    assert report["metadata"]["score"]["most"] == 7
    assert to_text(report).startswith("3 samples in 2 places, 1 to 2 in each\n")


def test_image_tokens_are_counted_instead_of_pictures(
    write_shard: WriteShard, make_samples: MakeSamples, tmp_path: Path
) -> None:
    source = ShardIndex(write_shard("a.tar", make_samples(3)))
    directory = tmp_path / "tokens"
    tokens = [np.full((2, 3, 4), number, dtype=np.uint16) for number in range(3)]
    samples = [EncodedSample(raw.key, each, None, None) for raw, each in zip(source, tokens, strict=True)]
    write_token_shard(directory / "train-00000.tar", samples)
    index = open_index([str(directory / "train-00000.tar")])
    options = SurveyOptions()
    survey = survey_index(index, options)
    report = summarize(survey, options, find=index.__getitem__)
    assert report["bad_samples"] == 0
    found = report["image_tokens"]
    assert (found["samples"], found["crops"], found["grids"]) == (3, {"2": 3}, {"3 x 4": 3})
    assert (found["tokens"], found["codes_in_use"], found["highest_code"], found["codebook"]) == (72, 3, 2, None)
    assert found["perplexity"] == pytest.approx(3)
    block = block_of_samples(survey, options, index.__getitem__)
    assert block is not None
    assert len(block.pictures) == 3

    fields = {"dvae_sha256": "ab", "image_size": 8, "crops": 2, "augmentation": "none", "background": "white"}
    fields |= {"small_pictures": "enlarge", "seed": 0, "filters": {}, "caption": "text"}
    splits: dict[str, Any] = {"train": [], "val": []}
    fields |= {"samples_sha256": splits, "n_shards": splits, "weights": splits}
    write_manifest(directory, TokenManifest(vocab_size=50, grid=[3, 4], **fields))  # type: ignore[arg-type]
    report = summarize(survey, options, find=index.__getitem__)
    assert report["image_tokens"]["codebook"] == 50
    assert "codes: 3 of 50 in use" in to_text(report)


def test_survey_of_parts_is_that_of_the_whole(shards: list[str]) -> None:
    options = SurveyOptions(samples=4)
    index = open_index(shards, skip_damage=True)
    surveyor = survey_scan._IndexSurveyor(index, options)
    whole, parts = surveyor(range(len(index))), Survey.empty(options)
    for start in range(0, len(index), 4):
        parts.merge(surveyor(range(start, min(start + 4, len(index)))))
    assert summarize(parts, options) == summarize(whole, options)
    assert Counter(whole.containers) == parts.containers


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decode": -1}, ValueError, "decode must be >= 0, got -1"),
        ({"decode": True}, TypeError, "decode must be an integer >= 0, got True"),
        ({"samples": 1001}, ValueError, "samples must be <= 1,000, got 1,001"),
        ({"image_size": 0}, ValueError, "image_size must be >= 1, got 0"),
        ({"seed": "a"}, TypeError, "seed must be an integer >= 0, got 'a'"),
        ({"filters": None}, TypeError, "filters must be a FilterConfig, got None"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SurveyOptions(**options)
