"""Filters: what they drop and why, and which settings they refuse."""

from __future__ import annotations

import builtins
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dalle1.data import filters as module
from dalle1.data.filters import FilterConfig, SampleFacts, is_other_language, reason_to_drop

CONF = Path(__file__).parents[2] / "conf" / "filters"


def reason(filters: dict[str, Any], **facts: Any) -> str | None:
    return reason_to_drop(FilterConfig(**filters))(SampleFacts(**facts))


def test_without_filters_all_samples_stay() -> None:
    assert not FilterConfig().is_active
    assert reason({}) is None


@pytest.mark.parametrize(
    ("filters", "width", "height", "expected"),
    [
        ({"min_side": 256}, 256, 999, None),
        ({"min_side": 256}, 999, 255, "side below 256"),
        ({"max_aspect": 2}, 200, 100, None),
        ({"max_aspect": 2}, 100, 200, None),
        ({"max_aspect": 2}, 201, 100, "aspect above 2"),
        ({"max_aspect": 2.0}, 100, 201, "aspect above 2"),
        ({"max_aspect": 1.5}, 76, 50, "aspect above 1.5"),
        ({"max_aspect": 1}, 7, 7, None),
        ({"min_side": 8, "max_aspect": 1}, 7, 9, "side below 8"),
        ({"min_side": 1}, None, None, "picture unreadable"),
        ({"max_aspect": 2}, None, None, "picture unreadable"),
    ],
)
def test_pictures_are_dropped_by_size(
    filters: dict[str, Any], width: int | None, height: int | None, expected: str | None
) -> None:
    assert reason(filters, width=width, height=height) == expected


@pytest.mark.parametrize(
    ("filters", "caption", "expected"),
    [
        ({"min_caption_words": 3}, "a red dog", None),
        ({"min_caption_words": 3}, " red\tdog ", "caption below 3 words"),
        ({"min_caption_words": 3}, "red - dog !", "caption below 3 words"),
        ({"max_caption_words": 2}, "red dog", None),
        ({"max_caption_words": 2}, "a red dog", "caption above 2 words"),
        ({"min_caption_characters": 6}, "  a dog  ", "caption below 6 characters"),
        ({"min_caption_characters": 6}, "a bird", None),
        ({"max_caption_characters": 3}, "犬と猫", None),
        ({"max_caption_characters": 3}, "犬と猫と", "caption above 3 characters"),
        ({"min_caption_words": 2, "min_caption_characters": 9}, "a dog", "caption below 9 characters"),
        ({"boilerplate": True}, "photographed on 3 May 2014", "boilerplate caption"),
        ({"boilerplate": True}, "a dog on 3 May 2014 in the park", None),
    ],
)
def test_captions_are_dropped_by_their_text(filters: dict[str, Any], caption: str, expected: str | None) -> None:
    assert reason(filters, caption=caption) == expected


@pytest.mark.parametrize(
    "filters",
    [{name: 1} for name in ("min_caption_words", "max_caption_words", "min_caption_characters")]
    + [{"boilerplate": True}, {"language": "en"}],
)
@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_missing_caption_is_dropped_by_caption_filters_only(filters: dict[str, Any], caption: str | None) -> None:
    assert reason(filters, caption=caption) == "no caption"
    assert reason({"min_side": 1}, caption=caption, width=2, height=2) is None


@pytest.mark.parametrize(
    ("condition", "value", "expected"),
    [
        ("UNLIKELY", "UNLIKELY", None),
        ("UNLIKELY", "unlikely", "json field not allowed"),
        (["UNLIKELY", "UNSURE"], "UNSURE", None),
        (["UNLIKELY", "UNSURE"], "NSFW", "json field not allowed"),
        (200, 200.0, None),
        (200, "200", "json field not allowed"),
        (True, True, None),
        (True, 1, "json field not allowed"),
        ([0, 1], False, "json field not allowed"),
        ("a", ["a"], "json field not allowed"),
        ({"min": 0.3}, 0.3, None),
        ({"min": 0.3}, 0.29, "json field below 0.3"),
        ({"min": 0.3}, "0.31", None),
        ({"min": 0.3}, " 0.2 ", "json field below 0.3"),
        ({"max": 2.0}, 2, None),
        ({"max": 2.0}, 10**400, "json field above 2"),
        ({"min": 1, "max": 2}, 0, "json field below 1"),
        ({"min": 1, "max": 2}, 3, "json field above 2"),
        ({"min": 0}, float("nan"), "json field is no number"),
        ({"min": 0}, "nan", "json field is no number"),
        ({"min": 0}, "many", "json field is no number"),
        ({"min": 0}, True, "json field is no number"),
        ({"min": 0}, [1], "json field is no number"),
        ({"min": 0}, None, "json field missing"),
        ("UNLIKELY", None, "json field missing"),
    ],
)
def test_metadata_must_meet_the_condition(condition: Any, value: Any, expected: str | None) -> None:
    assert reason({"json": {"field": condition}}, metadata={"field": value}) == expected


def test_field_that_is_not_there_drops_the_sample() -> None:
    assert reason({"json": {"similarity": {"min": 0.3}}}, metadata={"NSFW": "NSFW"}) == "json similarity missing"
    assert reason({"json": {"similarity": {"min": 0.3}}}) == "json similarity missing"


def test_dots_lead_into_objects_unless_they_are_in_the_name() -> None:
    assert reason({"json": {"exif.make": "Canon"}}, metadata={"exif": {"make": "Canon"}}) is None
    assert (
        reason({"json": {"exif.make": "Canon"}}, metadata={"exif": {"make": "Nikon"}}) == "json exif.make not allowed"
    )
    assert reason({"json": {"exif.make": "Canon"}}, metadata={"exif": "Canon"}) == "json exif.make missing"
    assert reason({"json": {"exif.make": "Canon"}}, metadata={"exif.make": "Canon", "exif": {}}) is None


def test_first_reason_in_the_documented_order_counts() -> None:
    facts: dict[str, Any] = {"width": 1, "height": 9, "caption": "IMG_1234", "metadata": {}}
    filters: dict[str, Any] = {
        "min_side": 2,
        "max_aspect": 2,
        "min_caption_words": 2,
        "json": {"a": 1},
        "boilerplate": True,
        "language": "en",
    }
    found = []
    for repaired in (
        {"width": None},
        {"width": 3},
        {"width": 9, "caption": None},
        {"caption": "IMG_1234"},
        {"caption": "photo 12345", "metadata": {}},
        {"metadata": {"a": 1}},
        {"caption": "eine rote Katze sitzt auf einem Sofa"},
        {"caption": "a red cat on a sofa"},
    ):
        found.append(reason(filters, **facts))
        facts |= repaired
    assert found == [
        "side below 2",
        "picture unreadable",
        "aspect above 2",
        "no caption",
        "caption below 2 words",
        "json a missing",
        "boilerplate caption",
        "language not en",
    ]
    assert reason(filters, **facts) is None


@pytest.mark.parametrize(
    ("filters", "needs"),
    [
        ({"min_side": 1}, "size"),
        ({"max_aspect": 1}, "size"),
        ({"min_caption_words": 1}, "caption"),
        ({"max_caption_characters": 1}, "caption"),
        ({"boilerplate": True}, "caption"),
        ({"language": "en"}, "caption"),
        ({"json": {"a": 1}}, "metadata"),
        ({"near_duplicates": 0}, "pixels"),
    ],
)
def test_only_what_a_filter_needs_must_be_read(filters: dict[str, Any], needs: str) -> None:
    config = FilterConfig(**filters)
    assert config.is_active
    for part in ("size", "caption", "metadata", "pixels"):
        assert getattr(config, f"needs_{part}") == (part == needs)


@pytest.mark.parametrize(
    "caption", ["a dog", "Two Dogs Run On The Beach", "A SMALL BLUE STAR ON A GRAY BACKGROUND", "42"]
)
def test_english_captions_stay(caption: str) -> None:
    assert not is_other_language(caption, "en")


@pytest.mark.parametrize(
    "caption",
    [
        "eine rote Katze sitzt auf einem Sofa",
        "un chien noir court sur la plage",
        "muž spí na gauči v zeleném pokoji",
        "собака на траве",
        "草地上的一只狗",
        "芝生の上の犬",
    ],
)
def test_captions_in_other_languages_are_found(caption: str) -> None:
    assert is_other_language(caption, "en")


def test_any_language_can_be_wanted() -> None:
    assert not is_other_language("eine rote Katze sitzt auf einem Sofa", "de")
    assert is_other_language("a red cat is sitting on a sofa", "de")


def test_caption_stays_unless_another_language_is_ten_times_as_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    class Detector:
        share = 0.0

        def rank(self, text: str) -> list[tuple[str, float]]:
            assert text == "taj mahal"
            return [("eo", 0.5), ("en", self.share)]

    monkeypatch.setattr(module, "_language_detector", lambda language: Detector())
    Detector.share = 0.051
    assert not is_other_language("Taj Mahal", "en")
    Detector.share = 0.049
    assert is_other_language("Taj Mahal", "en")


def test_language_that_the_detector_does_not_know_is_refused_before_any_sample() -> None:
    with pytest.raises(ValueError, match=r"language must be one of ace, af, .*, en, .*, got 'qq'$"):
        reason_to_drop(FilterConfig(language="qq"))


def test_missing_detector_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_detector(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("py3langid"):
            raise ImportError(name)
        return real_import(name, *args, **options)

    module._language_detector.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_detector)
    with pytest.raises(ValueError, match=r"needs py3langid, which is not installed; pip install '\.\[filters\]'"):
        reason_to_drop(FilterConfig(language="en"))


def test_reasons_and_configuration_can_be_pickled() -> None:
    config = FilterConfig(min_side=9, json={"a": [1, "b"]}, language="en")
    judge = pickle.loads(pickle.dumps(reason_to_drop(config)))
    assert judge(SampleFacts(width=8, height=8)) == "side below 9"
    assert pickle.loads(pickle.dumps(config)) == config


def test_configuration_goes_through_json_and_can_be_a_key() -> None:
    config = FilterConfig(max_aspect=2, json={"similarity": {"min": 0.3}, "status": ["success"]}, near_duplicates=4)
    again = FilterConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert len({config, again, FilterConfig(max_aspect=2)}) == 2


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_side": 0}, "min_side must be >= 1, got 0"),
        ({"max_aspect": 0.5}, r"max_aspect must be >= 1, .* got 0\.5; write 2"),
        ({"max_aspect": float("inf")}, "max_aspect must be a finite number, got inf"),
        ({"max_aspect": float("nan")}, "max_aspect must be a finite number, got nan"),
        ({"min_caption_words": -1}, "min_caption_words must be >= 1, got -1"),
        ({"min_caption_words": 5, "max_caption_words": 3}, "must be <= max_caption_words, got 5 and 3"),
        ({"min_caption_characters": 9, "max_caption_characters": 8}, "must be <= max_caption_characters, got 9 and 8"),
        ({"near_duplicates": -1}, "near_duplicates must be >= 0, got -1"),
        ({"near_duplicates": 7}, "near_duplicates must be <= 6 of 64 bits, got 7"),
        ({"language": "English"}, "language must be an ISO 639 code such as 'en', got 'English'"),
        ({"json": {"a": []}}, r"json\.a must allow at least one value"),
        ({"json": {"a": {}}}, r"json\.a must have min, max or both, got \{\}"),
        ({"json": {"a": {"min": 1, "b": 2}}}, r"json\.a must have min, max or both, got .*'b': 2.*'a\.field'"),
        ({"json": {"a": {"min": 2, "max": 1}}}, r"json\.a\.min must be <= json\.a\.max, got 2 and 1"),
        ({"json": {"a": {"max": float("nan")}}}, r"json\.a\.max must be a finite number, got nan"),
    ],
)
def test_value_outside_its_range_is_refused(filters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilterConfig(**filters)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_side": "256"}, "min_side must be an integer >= 1, got '256' of type str"),
        ({"min_side": True}, "min_side must be an integer >= 1, got True"),
        ({"max_aspect": "2"}, "max_aspect must be a number, got '2' of type str"),
        ({"max_aspect": True}, "max_aspect must be a number, got True"),
        ({"max_caption_words": 2.5}, r"max_caption_words must be an integer >= 1, got 2\.5"),
        ({"near_duplicates": False}, "near_duplicates must be an integer >= 0, got False"),
        ({"boilerplate": None}, "boilerplate must be true or false, got None"),
        ({"language": False}, "language must be a code such as 'en' or null, got False; .* quotes for 'no'"),
        ({"json": 3}, r"json must map fields to conditions, or be null for none, got 3"),
        ({"json": {1: "a"}}, "fields of json must be text, got 1"),
        ({"json": {"a": None}}, r"json\.a must be a text, a number, .* got None"),
        ({"json": {"a": [None]}}, r"json\.a must be a text, a number, .* got None"),
        ({"json": {"a": {"min": "1"}}}, r"json\.a\.min must be a number, got '1' of type str"),
    ],
)
def test_value_of_another_type_is_refused(filters: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FilterConfig(**filters)


def built(name: str, *changes: str) -> FilterConfig:
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), OmegaConf.from_dotlist(list(changes)))
    filters = instantiate(config, _convert_="all")
    assert isinstance(filters, FilterConfig)
    return filters


def test_none_drops_nothing() -> None:
    assert built("none") == FilterConfig()


@pytest.mark.parametrize("name", ["none", "paper"])
def test_every_field_is_listed(name: str) -> None:
    assert set(OmegaConf.load(CONF / f"{name}.yaml")) == {"_target_", *FilterConfig().to_dict()}


def test_paper_keeps_good_samples_of_any_size() -> None:
    facts: dict[str, Any] = {"caption": "a dog in the park", "width": 60, "height": 30}
    judge = reason_to_drop(built("paper"))
    assert judge(SampleFacts(**facts)) is None
    changes = {
        "aspect above 2": {"width": 61},
        "caption below 3 words": {"caption": "a dog"},
        "caption below 6 characters": {"caption": "a b c"},
        "boilerplate caption": {"caption": "photographed on May 3, 2014"},
        "language not en": {"caption": "ein Hund im Park"},
    }
    for expected, change in changes.items():
        assert judge(SampleFacts(**(facts | change))) == expected


def test_paper_can_be_changed() -> None:
    filters = built("paper", "min_side=256", "json.similarity.min=0.3", "json.NSFW=[UNLIKELY]")
    assert (filters.min_side, filters.max_aspect) == (256, 2)
    assert filters.json == {"similarity": {"min": 0.3}, "NSFW": ["UNLIKELY"]}
