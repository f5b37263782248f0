"""The documents point at things that exist."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def _anchors(page: Path) -> set[str]:
    """What a link to a heading of `page` ends in, as GitHub makes it of the heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        f"{path}#{anchor}" for path, anchor in links if anchor not in _anchors(page.parent / path if path else page)
    ]
    assert not missing


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make\s+([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert {"test", "demo"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_choices_in_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for group in ("stage", "experiment", "trainer", "logger", "filters"):
        for choice in re.findall(rf"\b{group}=([a-z0-9_]+)", text):
            assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    modules = re.findall(r"python\s+-m\s+(dalle1[\w.]*\w)", text)
    files = [ROOT / "src" / module.replace(".", "/") for module in modules]
    missing = [path for path in files if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file())]
    missing += [ROOT / name for name in re.findall(r"python ([\w/]+\.py)", text) if not (ROOT / name).is_file()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    cells = [len(re.sub(r"`[^`]*`", "", line).split("|")) if line.startswith("|") else 0 for line in lines]
    ragged = [lines[i] for i in range(1, len(lines)) if cells[i] and cells[i - 1] and cells[i] != cells[i - 1]]
    assert not ragged


@pytest.mark.parametrize(
    ("code", "is_complete", "requeues"), [(0, False, True), (143, False, True), (0, True, False), (1, False, False)]
)
def test_slurm_job_comes_again_if_it_has_ended_well_before_its_end(
    tmp_path: Path, code: int, is_complete: bool, requeues: bool
) -> None:
    run = tmp_path / "runs" / "paper" / "transformer"
    run.mkdir(parents=True)
    commands = {
        "srun": f'{"touch " + str(run / "summary.json") if is_complete else ":"}; echo "$@" > srun.txt; exit {code}',
        "scontrol": 'echo "$@" > scontrol.txt',
    }
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    subprocess.run(["bash", str(ROOT / "docs" / "slurm.sbatch"), "seed=7"], cwd=tmp_path, env=environment)
    assert (tmp_path / "srun.txt").read_text().split()[-1] == "seed=7"
    assert (tmp_path / "scontrol.txt").exists() == requeues
    if requeues:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 42\n"
