"""The gallery as a file: what is in it, and what can never be."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gallery_run import NASTY_PROMPTS, make_manifest, open_picture
from hydra import compose, initialize_config_dir
from PIL import Image, ImageDraw, ImageFilter

from dalle1.cli import quote_options
from dalle1.gallery import render_gallery, sampling_command

CONF = Path(__file__).resolve().parent.parent / "conf"
# Attributes from which a browser loads something, or to which it goes.
LINKS = {"src", "href", "srcset", "action", "formaction", "poster", "data", "background", "ping", "content"}


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[int, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((len(self.tags) - 1, data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str, **attributes: str) -> str:
        (number,) = [i for i, (name, own) in enumerate(self.tags) if name == tag and attributes.items() <= own.items()]
        return " ".join("".join(text for i, text in self.texts if i == number).split())

    def texts_of(self, tag: str) -> list[str]:
        return [text.strip() for i, text in self.texts if self.tags[i][0] == tag and text.strip()]

    def pictures(self) -> list[Image.Image]:
        uris = [attributes["src"] for attributes in self.all("img") if "src" in attributes]
        assert all(uri and uri.startswith("data:image/webp;base64,") for uri in uris)
        return [Image.open(io.BytesIO(base64.b64decode(str(uri).partition(",")[2], validate=True))) for uri in uris]

    def data(self) -> dict[str, Any]:
        (number,) = [i for i, (_, attributes) in enumerate(self.tags) if attributes.get("type") == "application/json"]
        return json.loads("".join(text for i, text in self.texts if i == number))


def _page(manifest: dict[str, Any], open_picture: Any = open_picture) -> Page:
    return Page(render_gallery(manifest, open_picture))


def test_every_picture_is_embedded_exactly_and_best_first() -> None:
    page = _page(make_manifest({"a": [0.1, 0.3], "b": [0.2, None, 0.4]}))
    files = [f"{number:04d}-picture-{i:04d}.png" for number, i in ((2, 2), (1, 1), (2, 0), (1, 0), (2, 1))]
    assert [picture["file"] for picture in page.data()["pictures"]] == files
    for picture, file in zip(page.pictures(), files, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(open_picture(file)))


def test_pictures_have_their_size_and_prompt_before_they_are_decoded() -> None:
    images = [
        attributes for attributes in _page(make_manifest({"a red circle": [0.1]})).all("img") if "src" in attributes
    ]
    assert [(image["width"], image["height"], image["alt"], image["decoding"]) for image in images] == [
        ("20", "16", "a red circle", "async")
    ]


def test_nothing_is_loaded_from_anywhere() -> None:
    page = _page(make_manifest({prompt: [0.1] for prompt in NASTY_PROMPTS}))
    assert "://" not in re.sub(r"base64,[^\"]*", "", render_gallery(make_manifest({"a": [0.1]}), open_picture))
    for tag, attributes in page.tags:
        links = {name: value for name, value in attributes.items() if name in LINKS and tag != "meta"}
        assert all((value or "").startswith("data:") for value in links.values()), (tag, links)
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_policy_forbids_all_but_the_pages_own_style_and_script() -> None:
    html = render_gallery(make_manifest({prompt: [0.1] for prompt in NASTY_PROMPTS}), open_picture)
    (policy,) = [tag["content"] for tag in Page(html).all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none'; ")
    assert str(policy).endswith("; img-src data:")


def test_links_to_the_files_are_relative_names() -> None:
    manifest = make_manifest({"a": [0.1]})
    manifest["prompts"][0]["pictures"][0]["file"] = "javascript:alert('1') #?.png"
    (picture,) = _page(manifest).data()["pictures"]
    assert picture["link"] == "./javascript%3Aalert%28%271%27%29%20%23%3F.png"


@pytest.mark.parametrize("prompt", NASTY_PROMPTS)
def test_prompts_are_text_wherever_they_stand(prompt: str) -> None:
    harmless = _page(make_manifest({"a": [0.1], "b": [0.2]}))
    page = _page(make_manifest({prompt: [0.1], "b": [0.2]}))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert [entry["prompt"] for entry in page.data()["prompts"]] == [prompt, "b"]
    assert prompt in [image.get("alt") for image in page.all("img")]


def test_data_holds_the_run_as_the_manifest_does() -> None:
    manifest = make_manifest({"a": [0.1]})
    run = _page(manifest).data()["run"]
    assert run == {key: manifest[key] for key in ("created", "versions", "settings", "checkpoints", "reranker")}
    assert list(run["settings"]) == list(manifest["settings"]), "in its order"


def test_numbers_that_a_browser_cannot_hold_are_kept_as_text_or_dropped() -> None:
    manifest = make_manifest({"a": [float("nan")]})
    manifest["settings"]["seed"] = 2**60 + 1
    data = _page(manifest).data()
    assert data["run"]["settings"]["seed"] == str(2**60 + 1)
    assert data["pictures"][0]["score"] is None


def test_pictures_without_scores_stay_in_order_and_offer_no_order_by_score() -> None:
    page = _page(make_manifest({"a": [None, None], "b": [None]}, reranker=None))
    assert [(p["prompt"], p["candidate"]) for p in page.data()["pictures"]] == [(0, 0), (0, 1), (1, 0)]
    assert [tag["value"] for tag in page.all("input") if tag["type"] == "radio"] == ["prompt", "candidate"]
    assert not [tag for tag in page.all("span") if tag.get("class") == "score"]


def test_one_prompt_is_the_title_and_needs_no_search() -> None:
    page = _page(make_manifest({"a red circle": [0.1, 0.2]}))
    assert page.text("h1") == "a red circle"
    assert not page.all("select")
    assert [tag["type"] for tag in page.all("input")] == ["radio", "radio"]


def test_several_prompts_can_be_chosen_from() -> None:
    page = _page(make_manifest({"a": [0.1], "b": [0.2], "c" * 100: [0.3]}))
    assert page.text("h1") == "3 prompts"
    assert [tag["value"] for tag in page.all("option")] == ["", "0", "1", "2"]
    assert page.text("option", value="2") == "c" * 79 + "…"


def test_head_says_how_many_were_kept_of_how_many() -> None:
    assert "2 pictures kept of 8 sampled" in render_gallery(make_manifest({"a": [0.1, 0.2]}), open_picture)
    manifest = make_manifest({"a": [0.1]})
    manifest["prompts"][0]["sampled"] = 1
    html = render_gallery(manifest, open_picture)
    assert "1 picture " in html
    assert "kept of" not in html


def test_incomplete_run_says_so_and_how_far_it_came() -> None:
    assert 'id="incomplete"' not in render_gallery(make_manifest({"a": [0.1]}), open_picture)
    manifest = make_manifest({"a": [0.1], "b": []}, complete=False)
    manifest["prompts"][1]["sampled"] = 0
    text = _page(manifest).text("p", id="incomplete")
    assert text == "This run is not complete: 8 of 16 candidates were sampled when this page was written."


def test_incomplete_run_counts_prompts_that_it_never_came_to() -> None:
    manifest = make_manifest({"a": [0.1]}, complete=False, origin={"prompts": ["a", "b", "c"]})
    assert "8 of 24 candidates" in render_gallery(manifest, open_picture)
    manifest["settings"]["variations"] = 20
    assert "8 of 60 candidates" in render_gallery(manifest, open_picture)


def test_incomplete_run_without_a_known_end_says_no_numbers() -> None:
    page = _page(make_manifest({"a": [0.1]}, complete=False))
    assert page.text("p", id="incomplete") == "This run is not complete."


def test_run_without_pictures_is_a_page_too() -> None:
    assert _page(make_manifest({"a": []}, complete=False)).text("p", id="nothing") == "No pictures yet."


def _photograph(file: str) -> Image.Image:
    """As rich as a photograph: soft noise with hard edges; 256 x 256 pixels."""
    picture = open_picture(file, (256, 256)).filter(ImageFilter.GaussianBlur(4))
    pen = ImageDraw.Draw(picture)
    for i in range(8):
        pen.ellipse((20 * i, 25 * i, 20 * i + 60, 25 * i + 40), fill=(30 * i, 255 - 30 * i, 128))
    return picture


def test_large_pictures_take_about_ten_thousand_bytes_and_look_the_same() -> None:
    manifest = make_manifest({"a": [0.1] * 4})
    per_picture = (
        len(render_gallery(manifest, _photograph)) - len(render_gallery(make_manifest({"a": []}), _photograph))
    ) / 4
    assert per_picture < 14_000
    for picture, entry in zip(_page(manifest, _photograph).pictures(), manifest["prompts"][0]["pictures"], strict=True):
        error = np.asarray(picture, dtype=float) - np.asarray(_photograph(entry["file"]), dtype=float)
        assert np.sqrt((error**2).mean()) < 6  # of 255


def test_small_pictures_are_only_kept_exactly_where_that_is_cheap() -> None:
    def open_rich(file: str) -> Image.Image:
        return open_picture(file, (128, 128)).filter(ImageFilter.GaussianBlur(1))

    exact = io.BytesIO()
    open_rich("a").save(exact, format="WEBP", lossless=True)
    empty, page = (len(render_gallery(make_manifest({"a": s}), open_rich)) for s in ([], [0.1]))
    assert page - empty < 0.5 * len(exact.getvalue())


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pictures_of_any_mode_are_embedded(mode: str) -> None:
    (picture,) = _page(make_manifest({"a": [0.1]}), lambda file: open_picture(file).convert(mode)).pictures()
    assert picture.size == (20, 16)


@pytest.mark.parametrize(
    "prompt", ["a red circle", "it's, [50%] $HOME ${x} = \\ `", "日本 🐉", " two\nlines ", *NASTY_PROMPTS[2:]]
)
def test_command_samples_the_same_prompt_with_the_same_settings(prompt: str) -> None:
    settings = make_manifest({})["settings"] | {"negative_prompt": "no, 'thanks'", "keep": None}
    program, script, *options = shlex.split(sampling_command(prompt, settings) or "")
    assert (program, script) == ("python", "sample.py")
    quoted = quote_options(options, text_options=("prompt", "negative_prompt"), path_options=("name",))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("sample", overrides=quoted)
    assert cfg.prompt == prompt
    assert cfg.negative_prompt == "no, 'thanks'"
    assert (cfg.prompts_file, cfg.out, cfg.name) == (None, None, "my run")
    assert (cfg.candidates, cfg.temperature, cfg.top_p) == (8, [0.5, 1.0], 0.95)


def test_command_spells_groups_and_their_options() -> None:
    rerank = {"kind": "clip", "model": "my clip", "only": "a directory", "allow_download": False}
    assert sampling_command("a", {"rerank": rerank, "seed": 1}) == (
        "python sample.py prompt=a rerank=clip 'rerank.model=my clip' rerank.allow_download=false seed=1"
    )


@pytest.mark.parametrize("prompt", ["'quoted'", '"quoted"', "???"])
def test_prompts_that_a_command_would_change_have_none(prompt: str) -> None:
    assert sampling_command(prompt, {"seed": 0}) is None
    assert sampling_command("a", {"negative_prompt": prompt}) is None


def test_page_of_very_many_pictures_has_the_best_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle1.gallery._MOST_PICTURES", 5)
    page = _page(make_manifest({"a": [0.5, 0.4, 0.3], "b": [0.9, 0.8, 0.7, 0.6]}))
    assert [picture["score"] for picture in page.data()["pictures"]] == [0.9, 0.8, 0.5, 0.4]
    assert len(page.pictures()) == 4
    assert page.text("p", id="left-out").startswith("3 more pictures are in the run's directory only")
    monkeypatch.setattr("dalle1.gallery._MOST_PICTURES", 7)
    assert not any(tag.get("id") == "left-out" for tag in _page(make_manifest({"a": [0.5] * 7})).all("p"))


def test_page_of_an_image_prompt_shows_the_picture_and_what_of_it_was_sampled_again() -> None:
    opened: list[str] = []

    def open_and_tell(name: str) -> Image.Image:
        opened.append(name)
        return open_picture(name)

    page = _page(make_manifest({"a": [0.5]}) | {"has_image_prompt": True}, open_and_tell)
    assert sorted(opened) == ["0001-picture-0000.png", "image.png", "mask.png"]
    assert len(page.pictures()) == 3
    assert not _page(make_manifest({"a": [0.5]})).texts_of("figcaption")
    assert page.texts_of("figcaption") == ["sampled from this picture", "white was sampled again"]


@pytest.mark.parametrize("name", ["--config-dir", "-m", "a b", "$(x)", "+new", "~old"])
def test_command_has_no_options_that_sample_py_could_not_have(name: str) -> None:
    assert sampling_command("a", {name: "evil", "seed": 1}) == "python sample.py prompt=a seed=1"
