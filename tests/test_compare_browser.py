"""The page of compared runs in a real browser, from disk: sorting, hiding, highlighting."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_compare import make_run, options, read

from dalle1.compare import compare
from dalle1.comparison_page import render_comparison

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH: apt install chromium"),
]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """Three runs, one of which has no value; the page must have loaded nothing and complained of nothing."""
    for name, rows in {"a": [{"step": 1, "val/loss": 10.0}], "b": [{"step": 1, "val/loss": 9.0}], "c": []}.items():
        make_run(tmp_path / name, rows, config=options(optim__lr={"a": 1, "b": 20, "c": 3}[name]))
    runs = read(tmp_path)
    path = tmp_path / "page.html"
    path.write_text(render_comparison(compare(runs), {run.directory: run.curves for run in runs}), encoding="utf-8")
    complaints: list[str] = []
    requests: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]


def _order(page: Any) -> str:
    return "".join(page.locator("tbody tr td:first-child span").all_text_contents())


def test_table_is_sorted_by_a_click_and_runs_are_hidden_and_highlighted(page: Any) -> None:
    assert _order(page) == "bac", "the best first, at first"
    for column, ascending, descending in (
        ("val/loss", "bac", "abc"),
        ("optim.lr", "acb", "bca"),
        ("run", "abc", "cba"),
    ):
        head = page.locator(f"th button:text-is('{column}')")  # its name has an arrow too
        head.click()
        assert _order(page) == ascending
        head.click()
        assert _order(page) == descending

    # Run b is the first of the chart, wherever its row is now.
    lines = page.locator("polyline")
    assert lines.locator("title").all_text_contents() == ["b", "a"]
    row = page.locator("tbody tr", has_text="b")
    row.hover()
    assert page.locator("polyline.near title").all_text_contents() == ["b"]
    script = "lines => lines.map(line => getComputedStyle(line).display !== 'none')"
    row.get_by_role("checkbox").uncheck()
    assert lines.evaluate_all(script) == [False, True]
    row.get_by_role("checkbox").check()
    assert lines.evaluate_all(script) == [True, True]
