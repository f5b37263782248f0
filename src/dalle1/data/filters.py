"""Which captioned pictures to leave out, and why: judged by facts on one sample, never by its pixels.

Near-duplicates are found by all samples together, see `near_duplicates`; here is only their setting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any

from dalle1.data.boilerplate import is_boilerplate
from dalle1.data.fields import require_bool, require_int
from dalle1.data.near_duplicates import MAX_DISTANCE

# Verdicts may be remembered by a configuration and this number: raise it when a rule drops other samples than before.
RULES_VERSION = 1

# A caption is taken for another language if that is more than this many times as likely as the wanted one. Measured
# with py3langid 0.4.0 on parts of 1,000 captions of Multi30k: of English ones it drops 0.5 % of those of 3 words, 0.1 %
# of 5 words and no whole caption; of German, French and Czech ones at least 86 %, 97 % and all. Of the 15,833 captions
# of Conceptual Captions' validation set it drops none. Single words and names say little: of English nouns 2 to 12 %
# are dropped ("pizza", "skateboard"; "Taj Mahal" too), of German, French and Czech words a quarter to two thirds.
TIMES_AS_LIKELY = 10
_NO_LANGUAGE = "zxx"  # the detector's class for numbers, markup and the like
_INSTALL = "pip install '.[filters]' in the project's directory"


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """What filters look at in a sample; what they do not need may be left out."""

    caption: str | None = None  # None: it has none
    width: int | None = None  # pixels, as the picture is seen; None: there is no picture, or its header is damaged
    height: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)  # its .json


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which samples to leave out; each filter is off where it is None, false or empty."""

    min_side: int | None = None  # pixels of the shorter side, >= 1
    max_aspect: float | None = None  # longer over shorter side, >= 1
    min_caption_words: int | None = None  # words stand between white space and have a letter or digit
    max_caption_words: int | None = None  # as min_caption_words
    min_caption_characters: int | None = None  # between the caption's ends
    max_caption_characters: int | None = None  # between the caption's ends
    # What fields of the .json must be: a value, a list of allowed values, or {min: , max: } with one of them or both,
    # inclusive. `a.b` is field b of the object a. Text must agree in case; in ranges, numbers in quotes are numbers.
    json: dict[str, Any] | None = field(default=None, hash=False)
    boilerplate: bool = False  # drop captions that are mostly dates, credits, file names and the like
    language: str | None = None  # drop captions that are in another language, by its ISO 639 code
    near_duplicates: int | None = None  # drop the later of two pictures whose hashes differ in at most as many bits

    def __post_init__(self) -> None:
        """Refuse fields of a wrong type (TypeError) or outside their range (ValueError)."""
        lengths = [f"{end}_caption_{unit}" for unit in ("words", "characters") for end in ("min", "max")]
        for name, minimum in (("min_side", 1), *((name, 1) for name in lengths), ("near_duplicates", 0)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), at_least=minimum)
        for lower, upper in (lengths[:2], lengths[2:]):
            _require_order(lower, getattr(self, lower), upper, getattr(self, upper))
        if self.near_duplicates is not None and self.near_duplicates > MAX_DISTANCE:
            raise ValueError(
                f"near_duplicates must be <= {MAX_DISTANCE} of 64 bits, got {self.near_duplicates}; lower it"
            )
        if self.max_aspect is not None:
            _require_number("max_aspect", self.max_aspect)
            if self.max_aspect < 1:
                raise ValueError(
                    f"max_aspect must be >= 1, the longer over the shorter side, got {self.max_aspect}; write 2 for "
                    "aspect ratios in [1/2, 2]"
                )
        require_bool("boilerplate", self.boilerplate)
        _require_language(self.language)
        if self.json is not None and not isinstance(self.json, dict):
            raise TypeError(f"json must map fields to conditions, or be null for none, got {self.json!r}")
        for name, condition in (self.json or {}).items():
            _require_condition(name, condition)

    @property
    def needs_size(self) -> bool:
        """Whether the size of pictures must be known."""
        return self.min_side is not None or self.max_aspect is not None

    @property
    def needs_caption(self) -> bool:
        """Whether captions must be read."""
        words = (self.min_caption_words, self.max_caption_words)
        characters = (self.min_caption_characters, self.max_caption_characters)
        has_limits = any(limit is not None for limit in (*words, *characters))
        return has_limits or self.boilerplate or self.language is not None

    @property
    def needs_metadata(self) -> bool:
        """Whether the .json must be read."""
        return bool(self.json)

    @property
    def needs_pixels(self) -> bool:
        """Whether pictures must be decoded, for `near_duplicates.hash_file`."""
        return self.near_duplicates is not None

    @property
    def is_active(self) -> bool:
        """Whether any filter is on."""
        return self.needs_size or self.needs_caption or self.needs_metadata or self.needs_pixels

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return asdict(self)


def reason_to_drop(config: FilterConfig) -> Callable[[SampleFacts], str | None]:
    """A function that says in a few words why a sample is dropped, or None if it stays; it can be pickled.

    The reasons, of which the first counts, are in this order: "picture unreadable", "side below 256", "aspect above 2";
    "no caption", "caption below 3 words", "caption above 256 words", the same with characters; "json NSFW missing",
    "json NSFW not allowed", "json similarity is no number", "json similarity below 0.3", "json similarity above 1";
    "boilerplate caption"; "language not en".

    Raises: ValueError if `language` needs a package that is not installed, or is not known to it.
    """
    if config.language is not None:
        _language_detector(config.language)
    return partial(_reason_to_drop, config)


def is_other_language(caption: str, language: str) -> bool:
    """Whether another language than `language` is far likelier for a caption, see `TIMES_AS_LIKELY`.

    Raises: ValueError as `reason_to_drop`.
    """
    # In lower case, since the detector takes capital letters for German and names.
    likelihoods = dict(_language_detector(language).rank(caption.lower()))
    return max(likelihoods.values()) > TIMES_AS_LIKELY * likelihoods[language]


def _reason_to_drop(config: FilterConfig, facts: SampleFacts) -> str | None:
    return (
        _size_reason(config, facts)
        or _length_reason(config, facts)
        or _json_reason(config, facts)
        or _content_reason(config, facts)
    )


def _size_reason(config: FilterConfig, facts: SampleFacts) -> str | None:
    if not config.needs_size:
        return None
    if facts.width is None or facts.height is None:
        return "picture unreadable"
    shorter, longer = sorted((facts.width, facts.height))
    if config.min_side is not None and shorter < config.min_side:
        return f"side below {config.min_side}"
    if config.max_aspect is not None and longer > config.max_aspect * shorter:
        return f"aspect above {_as_text(config.max_aspect)}"
    return None


def _length_reason(config: FilterConfig, facts: SampleFacts) -> str | None:
    if not config.needs_caption:
        return None
    caption = (facts.caption or "").strip()
    if not caption:
        return "no caption"
    n_words = sum(any(map(str.isalnum, word)) for word in caption.split())
    for length, minimum, maximum, unit in (
        (n_words, config.min_caption_words, config.max_caption_words, "words"),
        (len(caption), config.min_caption_characters, config.max_caption_characters, "characters"),
    ):
        if minimum is not None and length < minimum:
            return f"caption below {minimum} {unit}"
        if maximum is not None and length > maximum:
            return f"caption above {maximum} {unit}"
    return None


def _json_reason(config: FilterConfig, facts: SampleFacts) -> str | None:
    for name, condition in (config.json or {}).items():
        value = _look_up(facts.metadata, name)
        if value is None:
            return f"json {name} missing"
        if isinstance(condition, dict):
            number = _number(value)
            if number is None:
                return f"json {name} is no number"
            if "min" in condition and number < condition["min"]:
                return f"json {name} below {_as_text(condition['min'])}"
            if "max" in condition and number > condition["max"]:
                return f"json {name} above {_as_text(condition['max'])}"
        elif not any(_is_same(value, allowed) for allowed in _values(condition)):
            return f"json {name} not allowed"
    return None


def _content_reason(config: FilterConfig, facts: SampleFacts) -> str | None:
    if config.boilerplate and is_boilerplate(facts.caption or ""):
        return "boilerplate caption"
    if config.language is not None and is_other_language(facts.caption or "", config.language):
        return f"language not {config.language}"
    return None


def _look_up(metadata: Mapping[str, Any], name: str) -> Any:
    """The value of a field, which may have dots in its name; None if there is none."""
    if name in metadata:
        return metadata[name]
    value: Any = metadata
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _number(value: object) -> float | None:
    """A number, or one in quotes; None for anything else, NaN too."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return None if isinstance(value, bool) or not isinstance(value, int | float) or value != value else value


def _is_same(value: object, allowed: object) -> bool:
    # To Python, True is 1.
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _values(condition: Any) -> list[Any]:
    return condition if isinstance(condition, list) else [condition]


def _as_text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.15g}"


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")


def _require_order(lower: str, least: float | None, upper: str, most: float | None) -> None:
    if least is not None and most is not None and least > most:
        raise ValueError(f"{lower} must be <= {upper}, got {least} and {most}; no sample would be left")


def _require_language(language: object) -> None:
    if language is None:
        return
    if not isinstance(language, str):
        raise TypeError(f"language must be a code such as 'en' or null, got {language!r}; YAML needs quotes for 'no'")
    if not re.fullmatch("[a-z]{2,3}", language):
        raise ValueError(f"language must be an ISO 639 code such as 'en', got {language!r}")


def _require_condition(name: object, condition: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"fields of json must be text, got {name!r}; put it in quotes")
    if not isinstance(condition, dict):
        allowed = _values(condition)
        if not allowed:
            raise ValueError(f"json.{name} must allow at least one value, got an empty list")
        for value in allowed:
            if not isinstance(value, str | int | float):
                raise TypeError(
                    f"json.{name} must be a text, a number, true, false, a list of these, or {{min: , max: }}, got "
                    f"{value!r}"
                )
        return
    if not condition or not condition.keys() <= {"min", "max"}:
        raise ValueError(
            f"json.{name} must have min, max or both, got {condition!r}; name fields of objects with dots, such as "
            f"'{name}.field'"
        )
    for end, number in condition.items():
        _require_number(f"json.{name}.{end}", number)
    _require_order(f"json.{name}.min", condition.get("min"), f"json.{name}.max", condition.get("max"))


@cache
def _language_detector(language: str) -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError(f"filters.language needs py3langid, which is not installed; {_INSTALL}") from error
    # Its model is in the package, arrays without pickled objects.
    detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    languages = sorted(name for name in detector.labels if name != _NO_LANGUAGE)
    if language not in languages:
        raise ValueError(f"language must be one of {', '.join(languages)}, got {language!r}")
    detector.set_languages(languages)
    return detector
