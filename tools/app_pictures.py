"""Draw docs/images/app-*.webp of a page that is running: `python tools/app_pictures.py http://127.0.0.1:7860`.

Needs Playwright (`pip install '.[browser]'`) and a Chromium, and a model of the demo.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
PROMPT = "a large red star on the left on a black background"


def _sample(page: Any, prompt: str, candidates: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.evaluate(f"document.getElementById('candidates').value = {candidates}")
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("status")).to_have_text(f"Done: {candidates} pictures", timeout=600_000)
    for image in page.locator("#grid img").all():
        image.evaluate("image => image.decode()")


def _save(page: Any, name: str) -> None:
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").save(IMAGES / name, quality=85, method=6)


def main() -> None:
    """Draw all three."""
    (address,) = sys.argv[1:]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        page.goto(address)
        _sample(page, PROMPT, 15)
        _save(page, "app-desktop.webp")

        page.get_by_role("button", name="Go on from picture 1", exact=True).click()
        expect(page.locator("#cells")).to_be_focused()
        rows, cols = page.evaluate("facts.grid")
        # The left half but for its first and last rows, as if drawn.
        page.evaluate(
            "([rows, cols]) => { for (let row = 2; row < rows - 2; row += 1)"
            "  for (let col = 0; col < cols / 2 + 1; col += 1) setCell(row, col, true); }",
            [rows, cols],
        )
        _sample(page, PROMPT.replace("red star", "green circle"), 10)
        page.set_viewport_size({"width": 1280, "height": 1130})
        page.locator("#cells").focus()
        page.evaluate("scrollTo(0, 0)")
        _save(page, "app-mask.webp")

        phone = browser.new_page(
            viewport={"width": 360, "height": 720}, device_scale_factor=1.5, color_scheme="dark", has_touch=True
        )
        phone.goto(address)
        _sample(phone, PROMPT, 6)
        _save(phone, "app-phone.webp")
        browser.close()


if __name__ == "__main__":
    main()
