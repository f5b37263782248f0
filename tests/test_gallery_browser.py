"""The gallery in a real browser, from disk: `make test-browser`, with any Chromium that is installed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gallery_run import NASTY_PROMPTS, make_manifest, open_picture

from dalle1.gallery import render_gallery

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH: apt install chromium"),
]
expect = sync_api.expect

PROMPTS = {"a red circle": [0.1, 0.5, 0.3], "a blue square": [0.4, None, 0.2]}
BEST_FIRST = ["0001-1", "0002-0", "0001-2", "0002-2", "0001-0", "0002-1"]  # prompt and candidate


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def open_gallery(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page of a manifest from disk; at the end of the test it must have loaded and complained of nothing."""
    complaints: list[str] = []
    requests: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    # Nothing that is drawn may move before somebody touches the page.
    context.add_init_script("""
        window.shifts = [];
        new PerformanceObserver((list) => window.shifts.push(...list.getEntries().map((entry) => entry.value)))
            .observe({ type: "layout-shift", buffered: true });
    """)
    path = tmp_path / "index.html"

    def open_page(manifest: dict[str, Any] | None = None, *, width: int = 1280) -> Any:
        path.write_text(render_gallery(manifest or make_manifest(PROMPTS), open_picture), encoding="utf-8")
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert page.evaluate("window.shifts") == []
        return page

    yield open_page
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()] * requests.count(path.as_uri())


def _cards(page: Any) -> list[str]:
    """Prompt and candidate of each picture on the page, in order."""
    script = "cards => cards.map(card => pictures[card.dataset.index].file)"
    files = page.locator(".card").evaluate_all(script)
    return [f"{file[:4]}-{int(file[-8:-4])}" for file in files]


def _facts(page: Any) -> dict[str, str]:
    """All names and values in the viewer."""
    script = "terms => terms.map(term => [term.textContent, term.nextElementSibling.textContent])"
    return dict(page.locator("#viewer dt").evaluate_all(script))


def test_best_pictures_come_first_and_other_orders_are_a_click_away(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    assert _cards(page) == BEST_FIRST
    page.get_by_label("By prompt").check()
    assert _cards(page) == ["0001-1", "0001-2", "0001-0", "0002-0", "0002-2", "0002-1"]
    expect(page.locator(".group h2")).to_have_text(list(PROMPTS))
    page.get_by_label("By candidate").check()
    assert _cards(page) == ["0001-0", "0002-0", "0001-1", "0002-1", "0001-2", "0002-2"]
    expect(page.locator(".group")).to_have_count(0)
    page.get_by_label("Best first").check()
    assert _cards(page) == BEST_FIRST


def test_every_picture_is_drawn(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    for card in page.locator(".card img").all():
        card.scroll_into_view_if_needed()
        assert card.evaluate("async image => (await image.decode(), [image.naturalWidth, image.naturalHeight])") == [
            20,
            16,
        ]


def test_search_and_list_narrow_the_page_together(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    count = page.locator("#count")
    expect(count).to_have_text("6 pictures")
    page.get_by_label("Search prompts").fill("CIRCLE red")
    expect(page.locator(".card")).to_have_count(3)
    expect(count).to_have_text("3 of 6 pictures")
    page.get_by_label("Prompt", exact=True).select_option("a blue square")
    expect(page.get_by_text("No prompt matches.")).to_be_visible()
    page.get_by_label("Search prompts").fill("")
    assert _cards(page) == ["0002-0", "0002-2", "0002-1"]
    expect(page.get_by_text("No prompt matches.")).to_be_hidden()


def test_click_shows_everything_that_made_the_picture(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    page.locator(".card").nth(1).click()
    viewer = page.get_by_role("dialog", name="a blue square")
    expect(viewer).to_be_visible()
    expect(page.locator("#position")).to_have_text("2 of 6")
    facts = _facts(page)
    assert facts["score"] == "0.4000"
    assert facts["candidate"] == "0"
    assert facts["temperature"] == "[0.5,1]"
    assert facts["temperature_end"] == "none"
    assert facts["transformer sha256"] == "aa11"
    assert facts["transformer step"] == "7"
    assert facts["dvae sha256"] == "bb22"
    assert (facts["kind"], facts["sha256"]) == ("clip", "cc33")
    assert facts["torch"] == "2.13.0"
    assert "prompts_file" in facts
    assert (
        viewer.get_by_label("Command", exact=True).inner_text().startswith("python sample.py 'prompt=a blue square' ")
    )
    link = viewer.get_by_role("link", name="Original PNG")
    assert link.get_attribute("href") == "./0002-picture-0000.png"


def test_run_without_reranker_says_so(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery(make_manifest({"a": [None, None]}, reranker=None))
    page.locator(".card").first.click()
    assert (_facts(page)["kind"], _facts(page)["score"]) == ("none", "none")


def test_small_picture_is_enlarged_by_a_whole_factor_without_blur(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    page.locator(".card").first.click()
    large = page.locator("#large")
    box = large.bounding_box()
    assert box["width"] >= 400
    assert box["width"] % 20 == 0
    assert box["height"] / 16 == box["width"] / 20
    expect(large).to_have_css("image-rendering", "pixelated")
    stage = page.locator("#stage").bounding_box()
    assert box["x"] >= stage["x"]
    assert box["x"] + box["width"] <= stage["x"] + stage["width"]


def test_keyboard_alone_opens_steps_through_and_closes(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    keyboard, cards, position = page.keyboard, page.locator(".card"), page.locator("#position")
    for label in ("Search prompts", "Prompt", "Best first"):
        keyboard.press("Tab")
        expect(page.get_by_label(label, exact=True)).to_be_focused()
    keyboard.press("Tab")
    expect(cards.first).to_be_focused()
    expect(cards.first).to_have_css("outline-style", "solid")
    keyboard.press("ArrowRight")
    keyboard.press("Enter")
    expect(position).to_have_text("2 of 6")
    keyboard.press("ArrowRight")
    expect(position).to_have_text("3 of 6")
    for _ in range(4):
        keyboard.press("ArrowLeft")
    expect(position).to_have_text("1 of 6")
    expect(page.locator("#previous")).to_have_attribute("aria-disabled", "true")
    keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(cards.first).to_be_focused()


def test_buttons_step_through_what_is_shown_and_focus_returns_to_the_last_one(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    page.get_by_label("Search prompts").fill("blue")
    page.locator(".card").first.click()
    page.get_by_label("Next picture").click()
    expect(page.locator("#position")).to_have_text("2 of 3")
    page.get_by_label("Next picture").click()
    expect(page.locator("#position")).to_have_text("3 of 3")
    expect(page.get_by_label("Next picture")).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#position")).to_have_text("3 of 3")
    assert _facts(page)["candidate"] == "1"
    page.get_by_label("Close").click()
    expect(page.locator(".card").nth(2)).to_be_focused()


def test_arrows_move_between_lines_of_cards(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery(make_manifest({"a": [i / 40 for i in range(40)]}), width=360)
    cards = page.locator(".card")
    cards.first.focus()
    for key, index in {"ArrowDown": 2, "ArrowRight": 3, "ArrowUp": 1, "End": 39, "Home": 0}.items():
        page.keyboard.press(key)
        expect(cards.nth(index)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(cards.first).to_be_focused()


def test_settings_can_be_copied(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".card").first.click()
    page.get_by_role("button", name="Copy JSON").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied["prompt"] == "a red circle"
    assert (copied["candidate"], copied["score"]) == (1, 0.5)
    assert copied["settings"] == make_manifest({})["settings"]
    page.get_by_role("button", name="Copy command").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#text").text_content()


def test_without_a_clipboard_the_text_is_selected(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery()
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    page.locator(".card").first.click()
    page.get_by_role("button", name="Copy JSON").click()
    expect(page.get_by_role("button", name=re.compile("Ctrl"))).to_be_visible()
    assert json.loads(page.evaluate("getSelection().toString()"))["candidate"] == 1


def test_prompts_stay_text(open_gallery: Callable[..., Any]) -> None:
    page = open_gallery(make_manifest({prompt: [0.5] for prompt in NASTY_PROMPTS}))
    page.get_by_label("By prompt").check()
    headings = page.locator(".group h2").evaluate_all("titles => titles.map(title => title.textContent)")
    assert headings == NASTY_PROMPTS
    for i, prompt in enumerate(NASTY_PROMPTS):
        page.locator(".card").nth(i).click()
        assert page.locator("#prompt").text_content() == prompt
        assert page.locator("#viewer img").count() == 1
        page.keyboard.press("Escape")
    assert page.title() == "6 prompts · dalle1"
    assert page.locator("script").count() == 2


@pytest.mark.parametrize("width", [320, 360, 768, 2560])
def test_nothing_is_wider_than_the_window(open_gallery: Callable[..., Any], width: int) -> None:
    long = dict.fromkeys(NASTY_PROMPTS, (0.5, 0.25))
    page = open_gallery(make_manifest(long), width=width)
    for order in ("By prompt", "Best first"):
        page.get_by_label(order).check()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for i in (0, -1):
        page.locator(".card").nth(i).click()
        assert page.evaluate("viewer.scrollWidth <= viewer.clientWidth")
        assert page.evaluate("large.getBoundingClientRect().right <= innerWidth && large.offsetWidth >= 200")
        page.keyboard.press("Escape")
