"""The page of near pictures in a real browser, from disk: the threshold shows its share and marks the pairs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle1.evaluation.overlap_page import Pair, render_overlap
from dalle1.html_page import embed

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH: apt install chromium"),
]


def test_threshold_shows_its_share_and_marks_the_pairs(tmp_path: Path) -> None:
    similarities = np.array([1.0, 0.95, 0.5, 0.25])
    pictures = tuple(embed(Image.new("RGB", (30, 20), color)) for color in ("red", "blue"))
    pairs = [
        Pair(
            place=i,
            similarity=float(value),
            pictures=pictures,
            captions=("a", "b"),
            keys=("c", "d"),
            containers=("", ""),
        )
        for i, value in enumerate(similarities)
    ]
    path = tmp_path / "overlap.html"
    path.write_text(render_overlap(pairs, similarities, threshold=0.9, extractor="clip-0"), encoding="utf-8")
    complaints: list[str] = []
    requests: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        seen = []
        for place in (2, 3, 4, 0):  # of 0.25, 0.5, 0.9, 0.95 and 1
            page.locator("#threshold").fill(str(place))
            seen.append((page.locator("#share").text_content(), page.locator(".apart").count()))
        browser.close()
    assert seen == [
        ("0.900000: 50.00%, 2 of 4", 2),
        ("0.950000: 50.00%, 2 of 4", 2),
        ("1.000000: 25.00%, 1 of 4", 3),
        ("0.250000: 100.00%, 4 of 4", 0),
    ]
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
