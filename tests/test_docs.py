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
    for group in ("stage", "experiment", "trainer", "logger", "filters"):
        for choice in re.findall(rf"\b{group}=([a-z_]+)", text):
            assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    cells = [len(re.sub(r"`[^`]*`", "", line).split("|")) if line.startswith("|") else 0 for line in lines]
    ragged = [lines[i] for i in range(1, len(lines)) if cells[i] and cells[i - 1] and cells[i] != cells[i - 1]]
    assert not ragged
