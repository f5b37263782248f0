"""The page in a real browser: `make test-browser`, with any Chromium that is installed."""

from __future__ import annotations

import io
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web_page import serving

from dalle1.data.sampled_picture import read_sampled_picture
from dalle1.evaluation.pictures import to_uint8
from dalle1.pipeline import Pipeline
from dalle1.rerank.own_clip import CLIPReranker
from dalle1.sampling.filters import SamplingConfig
from dalle1.web import studio
from dalle1.web.asked import Limits

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH: apt install chromium"),
]
expect = sync_api.expect

HOSTILE = '<img src=x onerror="x()">'  # longer ones are not for the tiny model
MASK = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pipeline(checkpoints: dict[str, Path]) -> Pipeline:
    reranker = CLIPReranker.load(checkpoints["clip"])
    return Pipeline.from_checkpoint(transformer=checkpoints["transformer"], dvae=checkpoints["dvae"], reranker=reranker)


@pytest.fixture(scope="module")
def address(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    limits = Limits(candidates=8, upload_megabytes=0.1, results=4)
    with serving(pipeline, tmp_path_factory.mktemp("results"), limits=limits) as address:
        yield address


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end of the test it must have asked nobody else and complained of nothing."""
    complaints: list[str] = []
    requests: list[str] = []
    context = browser.new_context(accept_downloads=True)

    def open_page(*, width: int = 1280, **media: str) -> Any:
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(**media)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        expect(page.locator("body")).to_have_attribute("data-ready", "true")
        return page

    yield open_page
    context.close()
    # What the server refuses is told on the page; Chromium tells it too.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Sampling waits for this after the first row of tokens."""
    go_on, sampled = threading.Event(), studio._Told.sampled

    def hold(told: Any, progress: Any) -> None:
        sampled(told, progress)
        while progress.positions_done == 4 and not go_on.wait(0.05):
            told._job.check()

    monkeypatch.setattr(studio._Told, "sampled", hold)
    yield go_on
    go_on.set()


def _sample(page: Any, prompt: str, candidates: int = 2) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    if not page.get_by_label("Candidates").is_visible():  # in a narrow window
        page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Candidates").fill(str(candidates))
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("status")).to_have_text(f"Done: {candidates} picture{'s' * (candidates > 1)}")
    expect(page.locator("#grid a > img")).to_have_count(candidates)


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _save(page: Any, link: Any) -> tuple[str, bytes]:
    with page.expect_download() as download:
        link.click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def _focus(page: Any, locator: Any) -> None:
    """Reach an element with the Tab key alone."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if locator.evaluate("element => element === document.activeElement"):
            assert locator.evaluate("element => getComputedStyle(element).outlineStyle") == "solid", "focus is seen"
            return
    raise AssertionError(f"{locator} is not reached")


def test_from_a_prompt_to_a_completed_picture(
    open_page: Callable[..., Any], pipeline: Pipeline, held: threading.Event
) -> None:
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("a red circle")
    page.get_by_label("Candidates").fill("3")
    page.get_by_label("Temperature", exact=True).fill("0.9, 0.8, 0.7")
    page.get_by_label("Top k").fill("20")
    page.get_by_label("Seed", exact=True).fill("5")
    page.get_by_role("button", name="Sample", exact=True).click()

    # The first row is there, of every candidate, and the rest is grey.
    expect(page.locator("#grid")).to_have_attribute("data-rows", "1")
    expect(page.locator("#grid li")).to_have_count(3)
    for image in page.locator("#grid img").all():
        expect(image).to_have_attribute("src", re.compile("^data:image/webp;base64,"))
    expect(page.locator("#state")).to_have_text(re.compile(r"\d+ % · [\d.]+ tokens/s · \d+ s left"))
    held.set()

    # Then the pictures, best first.
    sampling = SamplingConfig(temperature=(0.9, 0.8, 0.7), top_k=20)
    (expected,) = pipeline(["a red circle"], candidates=3, seed=5, sampling=sampling)
    expect(page.locator("#grid b")).to_have_text([f"{score:.3f}" for score in expected.scores or []])
    expect(page.locator("#title")).to_have_text("a red circle")
    name, data = _save(page, page.get_by_role("link", name="Save picture 1"))
    assert name == f"0001-a-red-circle-{expected.candidates[0]:04d}.png"
    assert np.array_equal(_pixels(data), to_uint8(expected.images)[0])
    sampled = read_sampled_picture(data)
    assert sampled is not None
    assert sampled.prompt == "a red circle"

    # Other settings, and those of before again.
    page.get_by_label("Seed", exact=True).fill("6")
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_role("button", name="Use these settings").click()
    values = {"Prompt": "a red circle", "Temperature": "0.9,0.8,0.7", "Seed": "5", "Top k": "20"}
    for label, value in values.items():
        expect(page.get_by_label(label, exact=True)).to_have_value(value)

    # A mask by the mouse: down a column, along a row, and one cell back.
    page.get_by_role("button", name="Go on from picture 1").click()
    cells = page.get_by_role("application", name="Cells of the picture")
    expect(cells).to_be_focused()
    _drag(page, cells, (1, 1), (1, 2))
    _drag(page, cells, (2, 2), (2, 3), (2, 2))
    expect(page.locator("#cell")).to_have_text("Row 3, column 3: sampled again. 4 of 12 cells marked.")
    page.get_by_label("Prompt", exact=True).fill("a blue square")
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.locator("#title")).to_have_text("a blue square")
    expect(page.locator("#grid a > img")).to_have_count(3)

    mask = Image.fromarray(np.array(MASK, dtype=np.uint8) * 255)
    image_prompt = pipeline.image_prompt(Image.open(io.BytesIO(data)), mask=mask, sampled=sampled)
    (completed,) = pipeline(["a blue square"], candidates=3, seed=5, sampling=sampling, image_prompt=image_prompt)
    for number, pixels in enumerate(to_uint8(completed.images), 1):
        _, saved = _save(page, page.get_by_role("link", name=f"Save picture {number}"))
        assert np.array_equal(_pixels(saved), pixels)

    # All of it, and what was before.
    name, archive = _save(page, page.get_by_role("link", name="Download all"))
    assert name == "a-blue-square.zip"
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        assert {"a-blue-square/manifest.json", "a-blue-square/mask.png"} <= set(files.namelist())
    page.get_by_role("button", name="a red circle").click()
    expect(page.locator("#grid b")).to_have_text([f"{score:.3f}" for score in expected.scores or []])


def _drag(page: Any, cells: Any, *path: tuple[int, int]) -> None:
    """With the left button from cell to cell, (row, column)."""
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    for number, (row, col) in enumerate(path):
        page.mouse.move(box["x"] + (col + 0.5) * box["width"] / 4, box["y"] + (row + 0.5) * box["height"] / 3)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def test_keyboard_alone_does_all_of_it(open_page: Callable[..., Any], pipeline: Pipeline) -> None:
    page = open_page()
    keyboard = page.keyboard
    _focus(page, page.get_by_label("Prompt", exact=True))
    keyboard.type("a red circle")
    _focus(page, page.get_by_role("button", name="Sample", exact=True))
    keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Done: 3 pictures")
    expect(page.get_by_role("button", name="Sample", exact=True)).to_be_focused()
    _focus(page, page.get_by_role("button", name="Go on from picture 2"))
    keyboard.press("Enter")
    expect(page.locator("#cells")).to_be_focused()
    expect(page.locator("#cells")).to_have_css("outline-style", "solid")
    expect(page.locator("#cell")).to_have_text("Row 1, column 1: stays. 0 of 12 cells marked.")
    for key in [
        "ArrowUp",
        "ArrowDown",
        "ArrowRight",
        " ",
        "ArrowRight",
        " ",
        "ArrowDown",
        " ",
        *["ArrowRight"] * 3,
        " ",
    ]:
        keyboard.press(key)
    expect(page.locator("#cell")).to_have_text("Row 3, column 4: sampled again. 4 of 12 cells marked.")
    keyboard.press(" ")
    expect(page.locator("#cell")).to_have_text("Row 3, column 4: stays. 3 of 12 cells marked.")
    keyboard.press(" ")
    assert page.evaluate("mask.again.map((row) => row.map(Number))") == MASK
    _focus(page, page.get_by_label("Prompt", exact=True))
    with page.expect_response("**/requests") as sent:
        keyboard.press("Control+Enter")
    assert sent.value.request.post_data_json["again"] == MASK
    expect(page.locator("#past li")).to_have_count(2)
    expect(page.get_by_role("status")).to_have_text("Done: 3 pictures")
    _focus(page, page.locator("#past button").nth(1))
    keyboard.press("Enter")
    expect(page.locator("#title")).to_be_focused()
    expect(page.locator("#past button").nth(1)).to_have_attribute("aria-current", "true")


def test_rows_are_kept_and_marks_are_inverted_and_cleared(open_page: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mine.jpg"
    Image.new("RGB", (64, 48), "teal").save(path)
    page = open_page()
    page.get_by_label("Picture to go on from").set_input_files(path)
    page.get_by_label("Rows to keep").fill("1")
    page.get_by_role("button", name="Keep rows").click()
    marks = "mask.again.map((row) => row.map(Number))"
    assert page.evaluate(marks) == [[0] * 4, [1] * 4, [1] * 4]
    page.get_by_role("button", name="Invert").click()
    assert page.evaluate(marks) == [[1] * 4, [0] * 4, [0] * 4]
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Prompt", exact=True).fill("a")
    page.get_by_role("button", name="Sample", exact=True).click()
    sentence = "some cells of the picture must be marked to be sampled again, none are"
    expect(page.get_by_role("alert")).to_have_text(sentence)
    page.get_by_role("button", name="Remove the picture").click()
    expect(page.locator("#cells")).to_be_hidden()
    expect(page.get_by_label("Picture to go on from")).to_be_focused()
    _sample(page, "a", 1)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_mask_is_drawn_by_touch(browser: Any, address: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    Image.new("RGB", (16, 12), "teal").save(path)
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(address)
    page.get_by_label("Picture to go on from").set_input_files(path)
    cells = page.locator("#cells")
    expect(cells).to_be_visible()
    expect(cells).to_have_css("touch-action", "none")  # a finger draws, it does not scroll
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 5 / 8, box["y"] + box["height"] / 2)
    assert page.evaluate("mask.again.map((row) => row.map(Number))") == [[0] * 4, [0, 0, 1, 0], [0] * 4]
    context.close()


def test_stop_frees_the_place(open_page: Callable[..., Any], held: threading.Event) -> None:
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("a")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator("#grid")).to_have_attribute("data-rows", "1")
    other = open_page()
    other.get_by_label("Prompt", exact=True).fill("b")
    other.get_by_role("button", name="Sample", exact=True).click()
    expect(other.get_by_role("status")).to_have_text("Waiting: 1 request before this one")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped")
    expect(page.locator("#grid li")).to_have_count(0)
    # The first one holds at its first row; the other has come as far now.
    expect(other.locator("#grid")).to_have_attribute("data-rows", "1")
    held.set()
    expect(other.get_by_role("status")).to_have_text("Done: 3 pictures")


def test_mistakes_are_told_in_a_sentence(open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page()
    alert = page.get_by_role("alert")
    for label, value, sentence in (
        ("Prompt", "x" * 41, re.compile("^prompt must have at most 40 tokens")),
        ("Candidates", "9", "candidates must be at most 8 here, got 9"),
        ("Candidates", "1.5", re.compile("^candidates must be an integer")),
        ("Temperature", "warm", "temperature must be a number, got None"),
    ):
        before = page.get_by_label(label, exact=True).input_value()
        page.get_by_label("Prompt", exact=True).fill("a")
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_role("button", name="Sample", exact=True).click()
        expect(alert).to_have_text(sentence)
        page.get_by_label(label, exact=True).fill(before)
    (tmp_path / "no.png").write_bytes(b"<svg/>")
    page.get_by_label("Picture to go on from").set_input_files(tmp_path / "no.png")
    expect(alert).to_have_text(re.compile("it is not a JPEG, PNG or WebP file$"))
    (tmp_path / "large.png").write_bytes(b"x" * 200_000)
    page.get_by_label("Picture to go on from").set_input_files(tmp_path / "large.png")
    expect(alert).to_have_text("A picture's file must have at most 0.1 MB, this one has 0.2.")


def test_requests_of_before_are_there_after_loading_again_until_they_go(open_page: Callable[..., Any]) -> None:
    page = open_page()
    _sample(page, "a", 1)
    _sample(page, HOSTILE, 1)
    page.reload()
    expect(page.locator("#past button")).to_have_text([HOSTILE, "a"])
    expect(page.locator("#title")).to_have_text(HOSTILE)
    assert page.locator("img[src=x]").count() == 0
    other = open_page()
    for number in range(3):  # four are kept
        _sample(other, str(number), 1)
    page.evaluate("() => { const gone = document.querySelectorAll('#past button')[1]; gone.click(); gone.click(); }")
    page.wait_for_load_state("networkidle")
    expect(page.get_by_role("alert")).to_have_text(
        "the pictures of this request are not kept any more; sample them again"
    )
    expect(page.locator("#past button")).to_have_text([HOSTILE])


@pytest.mark.parametrize("width", [320, 360, 768, 2560])
def test_nothing_is_wider_than_the_window(open_page: Callable[..., Any], width: int) -> None:
    page = open_page(width=width)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    _sample(page, "W" * 20, 8)
    page.get_by_role("button", name="Go on from picture 1").click()
    expect(page.locator("#cells")).to_be_focused()
    assert page.evaluate(overflow) <= 0
    small = page.locator("summary, button:visible, a.button:visible, input:visible:not([type=checkbox])").evaluate_all(
        "all => all.filter((each) => each.getBoundingClientRect().height < 24).map((each) => each.outerHTML)"
    )
    assert small == [], "too small for a finger"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    _sample(page, "a", 1)
    page.get_by_role("button", name="Go on from picture 1").click()
    expect(page.locator("#cells")).to_be_focused()
    nameless = page.locator("input:visible, textarea:visible, canvas, progress").evaluate_all(
        "all => all.filter((each) => !each.ariaLabel && !(each.labels && each.labels.length)).map((each) => each.id)"
    )
    assert nameless == []
    assert page.locator("img:not([alt])").count() == 0
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").count() == 1
    for element in ("body", ".soft", "#go", "label > span", ".facts b", "textarea"):
        assert page.locator(element).first.evaluate(CONTRAST) >= 4.5, element  # WCAG 2.2, 1.4.3
    durations = page.locator(".button").evaluate_all(
        "all => all.map((each) => getComputedStyle(each).transitionDuration)"
    )
    assert set(durations) == {"0s"}


# Of an element's text to what is behind it, as WCAG 2.2 defines it.
CONTRAST = """element => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => channels(color).slice(0, 3)
    .map((value) => value / 255).map((value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [.2126, .7152, .0722][i], 0);
  let behind = element;
  while (channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [low, high] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance).sort();
  return (high + .05) / (low + .05);
}"""
