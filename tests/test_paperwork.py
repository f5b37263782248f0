"""What goes with the code says what is so: licences of libraries, the citation, the changelog."""

from __future__ import annotations

import datetime
import re
import tomllib
from email.message import Message
from pathlib import Path

import pytest
import third_party
import yaml

from dalle1.checkpoint import FORMAT_VERSION

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_library_is_listed_with_its_licence() -> None:
    text = third_party.PAGE.read_text("utf-8")
    assert text == third_party.write_page(text), "python tools/third_party.py renews it"
    named = third_party.dependencies()
    assert named["torch"] == "always"
    assert named["mkdocs"] == "docs"
    assert not {"dalle1", "pytest", "ruff"} & set(named)
    assert all(f"\n| {name} | {group} | " in text for name, group in named.items())


def package(**fields: str | list[str]) -> Message:
    message = Message()
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"License_Expression": "MIT-CMU", "License": "other"}, "MIT-CMU"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0"),
        ({"License": "Copyright (c) 2001 by many people, who say much more"}, None),
        (
            {"License": "A text of many words. " * 9, "Classifier": ["Topic :: X", "License :: OSI :: BSD License"]},
            "BSD",
        ),
        ({"Classifier": ["License :: OSI Approved :: MIT License"]}, "MIT"),
        ({"License": "UNKNOWN", "Classifier": ["License :: OSI Approved :: MIT License"]}, "MIT"),
        ({"License": "UNKNOWN"}, None),
    ],
)
def test_licence_is_what_a_package_names(fields: dict[str, str | list[str]], name: str | None) -> None:
    found = package(Name="any", **fields)
    if name is None:
        with pytest.raises(ValueError, match="any must name its licence"):
            third_party.licence(found)  # type: ignore[arg-type]
    else:
        assert third_party.licence(found) == name  # type: ignore[arg-type]


def test_a_library_that_is_not_installed_keeps_its_row_and_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(third_party, "dependencies", lambda: {"not-installed-here": "never"})
    head = "# Any\n\n| library | needed for | licence |\n|---|---|---|\n"
    kept = f"{head}| not-installed-here | never | MIT |\n\nMore.\n"
    assert third_party.write_page(kept) == kept
    with pytest.raises(ValueError, match=r"'not-installed-here' must be installed.*\[never\]"):
        third_party.write_page(f"{head}| gone | always | MIT |\n\nMore.\n")


def test_citation_is_one_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    # What the format, version 1.2.0, requires.
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(isinstance(citation[name], str) and citation[name] for name in ("message", "title"))
    for entry in (citation, *citation["references"]):
        assert entry["authors"]
        assert all(author.keys() in ({"name"}, {"family-names", "given-names"}) for author in entry["authors"])
    assert all(entry["type"] == "conference-paper" and entry["title"] for entry in citation["references"])
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_changelog_has_releases_in_order_each_with_its_checkpoint_format() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first, *released = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert first.startswith("Unreleased\n")
    formats = [re.search(r"^\*Checkpoint format: (\d+)", part, flags=re.MULTILINE) for part in (first, *released)]
    assert all(formats)
    assert formats[0]
    assert int(formats[0][1]) == FORMAT_VERSION
    heads = [re.match(r"(\d+)\.(\d+)\.(\d+) - (\S+)\n", part) for part in released]
    assert all(heads), "a release is '## 1.2.3 - 2026-01-31'"
    keys = [(tuple(map(int, head.groups()[:3])), datetime.date.fromisoformat(head[4])) for head in heads if head]
    assert keys == sorted(keys, reverse=True)
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE)) <= allowed
