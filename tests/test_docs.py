"""The documents point at things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_choices_in_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for group in ("stage", "experiment", "trainer", "logger"):
        for choice in re.findall(rf"\b{group}=([a-z_]+)", text):
            assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"
