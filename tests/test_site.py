"""The documentation as a site: it builds without a warning, asks nobody for anything, and no link leads nowhere."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from mkdocs.exceptions import PluginError
from site_pages import OUTSIDE, rewrite_links

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])


class _Html(HTMLParser):
    """What a page of the site asks for, leads to, and can be led to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values["id"]} if "id" in values else set()
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(values["href"])
        elif "src" in values:
            self.loads.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds."""
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(directory)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # news of the theme's makers
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return directory


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, _Html]:
    return {path.relative_to(site).as_posix(): _Html(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_every_page_of_the_repository_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = re.findall(r"[\w./-]+\.md", text[text.index("\nnav:") :])
    here = [OUTSIDE.get(path.relative_to(ROOT).as_posix(), path.name) for path in PAGES]
    missing = sorted(set(here) - set(named))
    assert not missing, f"add {missing} to nav in mkdocs.yml, or to OUTSIDE in tools/site_pages.py"
    assert sorted(named) == sorted(set(named)), "a page stands in nav twice"


def test_every_page_is_there_with_its_text(site: Path, pages: dict[str, _Html]) -> None:
    for path in PAGES:
        name = OUTSIDE.get(path.relative_to(ROOT).as_posix(), path.name)
        title = re.search(r"^# (.+)$", path.read_text("utf-8"), flags=re.MULTILINE)
        assert title
        assert f">{title[1]}" in (site / name).with_suffix(".html").read_text("utf-8"), name
    assert len(pages) == len(PAGES) + 1, "and the page of an address that does not exist"


def test_site_asks_nobody_for_anything(site: Path, pages: dict[str, _Html]) -> None:
    loads = {load for page in pages.values() for load in page.loads}
    assert any(load.endswith(".js") for load in loads)
    assert not [load for load in loads if "//" in load]
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not [style for style in styles if re.search(r"url\(['\"]?(https?:)?//|@import", style)]


def test_links_and_pictures_of_the_site_lead_somewhere(site: Path, pages: dict[str, _Html]) -> None:
    wrong = []
    for name, page in pages.items():
        if name == "404.html":  # it is shown at any address, so its links begin at the root
            continue
        for link in (*page.links, *page.loads):
            if re.match("https?://|mailto:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), path.partition("?")[0])) if path else name
            )
            found = (site / target).exists() and (not anchor or unquote(anchor) in pages[target].ids)
            wrong += [] if found else [f"{link} in {name}"]
    assert not wrong


def test_search_finds_what_a_page_says(site: Path) -> None:
    assert "logit-Laplace" in (site / "search" / "search_index.json").read_text("utf-8")


NAMES = {*OUTSIDE.values(), "data.md", "slurm.sbatch"}


@pytest.mark.parametrize(
    ("page", "before", "after"),
    [
        ("index.md", "[data](docs/data.md#speed)", "[data](data.md#speed)"),
        ("index.md", "[how](data/README.md)", "[how](recipes.md)"),
        ("recipes.md", "[data](../docs/data.md)", "[data](data.md)"),
        ("data.md", "[recipes](../data/README.md#emoji)", "[recipes](recipes.md#emoji)"),
        ("data.md", "[job](slurm.sbatch)", "[job](slurm.sbatch)"),
        ("data.md", "[here](#speed) [there](https://a.b/c.md)", "[here](#speed) [there](https://a.b/c.md)"),
        ("data.md", "`[a](b.md)`\n```\n[a](b.md)\n```", "`[a](b.md)`\n```\n[a](b.md)\n```"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page: str, before: str, after: str) -> None:
    assert rewrite_links(before, page, NAMES) == after


@pytest.mark.parametrize("link", ["missing.md", "../src/dalle1/cli.py", "../README.md.bak"])
def test_a_link_to_what_the_site_does_not_have_stops_the_build(link: str) -> None:
    with pytest.raises(PluginError, match=re.escape(f"got {link!r} in docs/data.md")):
        rewrite_links(f"[that]({link})", "data.md", NAMES)
